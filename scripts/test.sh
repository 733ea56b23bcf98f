#!/usr/bin/env bash
# All tests, on two processes, and the line coverage of prune_opd/ with all the processes that they start.
#
# Coverage starts in each Python process by itself (coverage's .pth file, COVERAGE_PROCESS_START), in forked ranks after
# the imports (tests/forked/server.py). A process that is killed leaves no data.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$PWD/build/coverage
rm -rf "$folder"
mkdir -p "$folder"
code=0
COVERAGE_PROCESS_START=$PWD/pyproject.toml COVERAGE_FILE=$folder/data \
    .venv/bin/pytest -n 2 --dist loadgroup --no-loadscope-reorder -rs "$@" || code=$?
export COVERAGE_FILE=$folder/data
.venv/bin/coverage combine --quiet "$folder" && echo "line coverage: $(.venv/bin/coverage report --format=total)%"
exit "$code"
