#!/usr/bin/env bash
# Put the packages of requirements/REQUIREMENTS.txt, without their dependencies, into the folder .venv-NAME, which only some
# processes add to their path. Does nothing when it is up to date.
#
#   setup_folder.sh NAME REQUIREMENTS ["what is skipped without it"]
#                              with the third argument: where pip cannot get them, that is said in one line, and it succeeds
#   PYTHON=/path/to/python     whose pip to use (default: that of .venv)
set -euo pipefail
cd "$(dirname "$0")/.."

REQUIREMENTS=requirements/$2.txt
SKIPPED=${3:-}
PYTHON=${PYTHON:-.venv/bin/python}
FOLDER=.venv-$1
STAMP=$FOLDER/.setup-stamp
WANTED=$(cat "$REQUIREMENTS" scripts/setup_folder.sh | cksum)

[ "$(cat "$STAMP" 2>/dev/null)" != "$WANTED" ] || exit 0
echo "setup: $REQUIREMENTS (without their dependencies) into $FOLDER"
rm -rf "$FOLDER"
if said=$("$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target "$FOLDER" -r "$REQUIREMENTS" 2>&1); then
    echo "$WANTED" >"$STAMP"
    exit 0
fi
rm -rf "$FOLDER"
reason=$(grep -m 1 '^ERROR' <<<"$said" || tail -n 1 <<<"$said")
if [ -n "$SKIPPED" ]; then
    echo "setup: $SKIPPED will be skipped, since pip could not install $REQUIREMENTS: $reason" >&2
    exit 0
fi
echo "error: pip could not install $REQUIREMENTS: $reason" >&2
exit 1
