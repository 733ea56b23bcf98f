#!/usr/bin/env bash
# Make .venv-NAME from requirements/NAME.txt, a small environment without torch: `launch` submits jobs (NeMo-Run), `docs`
# builds the site. Does nothing when it is up to date.
#
#   setup_small.sh launch|docs
#   PYTHON=/path/to/python3.11   the interpreter to use (default: python3.11)
set -euo pipefail
cd "$(dirname "$0")/.."

NAME=$1
PYTHON=${PYTHON:-python3.11}
VENV=.venv-$NAME
STAMP=$VENV/.setup-stamp
WANTED=$({ pwd && cat "requirements/$NAME.txt" scripts/setup_small.sh; } | cksum)

[ "$(cat "$STAMP" 2>/dev/null)" != "$WANTED" ] || exit 0
[ -e "$VENV" ] || "$PYTHON" -m venv "$VENV"
rm -f "$STAMP"
echo "setup: requirements/$NAME.txt into $VENV"
"$VENV/bin/pip" install --quiet --disable-pip-version-check --no-deps -r "requirements/$NAME.txt"
echo "$WANTED" >"$STAMP"
