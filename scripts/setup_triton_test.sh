#!/usr/bin/env bash
# Make .venv-triton, the folder that tests/loss/test_kernels.py adds to the path of its processes. Does nothing when it is
# up to date. Where pip cannot get it, it says so in one line and succeeds: those tests are then skipped.
#
#   PYTHON=/path/to/python   whose pip to use (default: that of .venv)
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
FOLDER=.venv-triton
STAMP=$FOLDER/.setup-stamp
WANTED=$(cat requirements/triton-test.txt scripts/setup_triton_test.sh | cksum)

[ "$(cat "$STAMP" 2>/dev/null)" != "$WANTED" ] || exit 0
echo "setup: requirements/triton-test.txt (200 MB) into $FOLDER"
rm -rf "$FOLDER"
if said=$("$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target "$FOLDER" \
    -r requirements/triton-test.txt 2>&1); then
    echo "$WANTED" >"$STAMP"
    exit 0
fi
rm -rf "$FOLDER"
reason=$(grep -m 1 '^ERROR' <<<"$said" || tail -n 1 <<<"$said")
echo "setup-triton-test: the tests of the loss's Triton kernels will be skipped: $reason" >&2
