#!/usr/bin/env bash
# Make .venv-h100, the image's Python on this machine, by the image's own script (docker/install_python.sh): the CUDA
# packages of docker/pins.h100.txt (9 GB), Transformer Engine compiled against them (half an hour of one core), apex's
# kernel. No GPU and no driver are needed, and no CUDA either: nvcc is in the pins. Does nothing when it is up to date.
#
#   PYTHON=/path/to/python3.11   the interpreter to use (default: python3.11)
#   APEX_SOURCE=DIRECTORY|none   a checkout of NVIDIA's apex, or do without (default: it is fetched)
#   MAX_JOBS=4                   compilers at once, of 1 GB each (default: 1)
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.11}
VENV=.venv-h100
STAMP=$VENV/.setup-stamp
SOURCES=(docker/pins.h100.txt docker/pins.h100-build.txt docker/apex.commit docker/apex_kernel.py docker/install_python.sh)
WANTED=$({ pwd && cat "${SOURCES[@]}" scripts/setup_h100.sh; } | cksum)

[ "$(cat "$STAMP" 2>/dev/null)" != "$WANTED" ] || exit 0
[ -e "$VENV" ] || "$PYTHON" -m venv "$VENV"
rm -f "$STAMP"
PATH=$PWD/$VENV/bin:$PATH
export PATH
# What is compiled belongs to this torch, this compiler and this Python, and outlives the environment.
cache=${PRUNE_OPD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/prune-opd}
key=$({ python -VV && grep -E '^(torch|nvidia-[a-z-]*)==' docker/pins.h100.txt; } | cksum | cut -d ' ' -f 1)
export WHEELS=$cache/wheels/h100-$key MAX_JOBS=${MAX_JOBS:-1}
# Where pip knows CPU wheels of torch (2.13.0+cpu), it takes them for torch==2.13.0. The index's CUDA wheel has no suffix.
PIP_CONSTRAINT=$(mktemp)
export PIP_CONSTRAINT
trap 'rm -f "$PIP_CONSTRAINT"' EXIT
grep '^torch==' docker/pins.h100.txt | sed 's/==/===/' >"$PIP_CONSTRAINT"
echo "setup: docker/pins.h100.txt into $VENV; what is compiled goes to $WHEELS"
bash docker/install_python.sh h100 docker
python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
echo "$WANTED" >"$STAMP"
