#!/usr/bin/env bash
# Make .venv-te, the folder that tests/te adds to the path of its processes. Does nothing when it is up to date.
#
#   PYTHON=/path/to/python   whose pip to use (default: that of .venv)
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
FOLDER=.venv-te
STAMP=$FOLDER/.setup-stamp
WANTED=$(cat requirements/te-test.txt scripts/setup_te_test.sh | cksum)

if [ "$(cat "$STAMP" 2>/dev/null)" = "$WANTED" ]; then
    exit 0
fi
echo "setup: requirements/te-test.txt (without their dependencies) into $FOLDER"
rm -rf "$FOLDER"
if ! "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target "$FOLDER" -r requirements/te-test.txt; then
    rm -rf "$FOLDER"
    echo "error: pip could not install requirements/te-test.txt, which tests/te need: see its message above" >&2
    exit 1
fi
echo "$WANTED" >"$STAMP"
