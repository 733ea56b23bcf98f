#!/usr/bin/env bash
# Make .venv-docs, the small environment that builds the docs. Does nothing when it is up to date.
#
#   PYTHON=/path/to/python3.11   the interpreter to use (default: python3.11)
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.11}
VENV=.venv-docs
STAMP=$VENV/.setup-stamp
WANTED=$({ pwd && cat requirements/docs.txt scripts/setup_docs.sh; } | cksum)

[ "$(cat "$STAMP" 2>/dev/null)" != "$WANTED" ] || exit 0
[ -e "$VENV" ] || "$PYTHON" -m venv "$VENV"
rm -f "$STAMP"
echo "setup: requirements/docs.txt into $VENV"
"$VENV/bin/pip" install --quiet --disable-pip-version-check --no-deps -r requirements/docs.txt
echo "$WANTED" >"$STAMP"
