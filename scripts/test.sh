#!/usr/bin/env bash
# All tests, in two processes side by side (tests/conftest.py says which test is where), and the line coverage of
# prune_opd/ over all the processes that they start.
#
# Coverage starts in each Python process by itself (coverage's .pth file, COVERAGE_PROCESS_START), in forked ranks after
# the imports (tests/forked/server.py). A process that is killed leaves no data.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$PWD/build/coverage
rm -rf "$folder"
mkdir -p "$folder"
export COVERAGE_PROCESS_START=$PWD/pyproject.toml COVERAGE_FILE=$folder/data
code=0
.venv/bin/pytest -rs -m "slurm or not ranks" "$@" >"$folder/others.txt" 2>&1 &
others=$!
trap 'kill "$others" 2>/dev/null || true' EXIT
.venv/bin/pytest -rs -m "ranks and not slurm" "$@" || code=$?
wait "$others" || code=$?
cat "$folder/others.txt"
unset COVERAGE_PROCESS_START
.venv/bin/coverage combine --quiet "$folder" && echo "line coverage: $(.venv/bin/coverage report --format=total)%"
exit "$code"
