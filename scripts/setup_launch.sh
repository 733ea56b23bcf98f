#!/usr/bin/env bash
# Make .venv-launch, the small environment that submits jobs (NeMo-Run, no torch). Does nothing when it is up to date.
#
#   PYTHON=/path/to/python3.11   the interpreter to use (default: python3.11)
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.11}
VENV=.venv-launch
STAMP=$VENV/.setup-stamp
WANTED=$({ pwd && cat requirements/launch.txt scripts/setup_launch.sh; } | cksum)

[ "$(cat "$STAMP" 2>/dev/null)" != "$WANTED" ] || exit 0
[ -e "$VENV" ] || "$PYTHON" -m venv "$VENV"
rm -f "$STAMP"
echo "setup: requirements/launch.txt into $VENV"
"$VENV/bin/pip" install --quiet --disable-pip-version-check --no-deps -r requirements/launch.txt
echo "$WANTED" >"$STAMP"
