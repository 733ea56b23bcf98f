#!/usr/bin/env bash
# All tests, in three processes side by side (tests/conftest.py says which test is where), and the line coverage of
# prune_opd/ over all the processes that they start (tests/lines).
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$PWD/build/coverage
rm -rf "$folder"
mkdir -p "$folder"
export PRUNE_OPD_LINES=$folder
start=$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/line_notes.pth
echo "import os, sys; exec('if \"PRUNE_OPD_LINES\" in os.environ: sys.path.append(\"$PWD/tests/lines\"); import line_notes')" >"$start"
code=0
# What starts no ranks has what the others leave of the two cores.
nice -n 5 .venv/bin/pytest -rs -m "slurm or not ranks" "$@" >"$folder/others.txt" 2>&1 &
others=$!
.venv/bin/pytest -rs -m runs "$@" >"$folder/runs.txt" 2>&1 &
runs=$!
trap 'kill "$others" "$runs" 2>/dev/null || true; rm -f "$start"' EXIT
.venv/bin/pytest -rs -m "ranks and not runs and not slurm" "$@" || code=$?
wait "$runs" || code=$?
cat "$folder/runs.txt"
wait "$others" || code=$?
cat "$folder/others.txt"
.venv/bin/python tests/lines/report.py "$folder"
exit "$code"
