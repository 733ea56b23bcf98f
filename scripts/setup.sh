#!/usr/bin/env bash
# Make .venv with the pinned CPU set (requirements/). Does nothing when it is up to date.
#
#   PYTHON=/path/to/python3.11   the interpreter to use (default: python3.11)
#   ALLOW_CUDA_TORCH=1           install torch even if pip finds its CUDA build only
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.11}
NEEDED=3.11
VENV=.venv
STAMP=$VENV/.setup-stamp

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

version_of() {
    "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null || true
}

check_python() {
    local version other
    version=$(version_of "$PYTHON")
    if [ -z "$version" ]; then
        other=$(version_of python3)
        fail "$PYTHON cannot be run${other:+ (python3 is Python $other)}: install Python $NEEDED, or name it with" \
            "make setup PYTHON=/path/to/python$NEEDED"
    fi
    case $version in
        "$NEEDED".*) ;;
        *) fail "$PYTHON is Python $version, and the pinned packages need Python $NEEDED: install it, or name it with" \
            "make setup PYTHON=/path/to/python$NEEDED" ;;
    esac
}

check_venv() {
    local version
    version=$(version_of "$VENV/bin/python")
    case $version in
        "$NEEDED".*) ;;
        *) fail "$VENV is an environment of Python ${version:-unknown}, not $NEEDED: remove it (rm -r $VENV) and run make setup again" ;;
    esac
}

# The CUDA build of torch brings gigabytes of nvidia-* packages that a CPU run never uses.
refuse_cuda() {
    local cuda
    [ "${ALLOW_CUDA_TORCH:-0}" = 1 ] && return
    cuda=$("$VENV/bin/pip" install --quiet --dry-run --report - "$1" | "$VENV/bin/python" scripts/cuda_packages.py)
    [ -z "$cuda" ] || fail "pip finds only a CUDA build of $1 (it would install $cuda). Point it at CPU wheels:" \
        "PIP_FIND_LINKS=DIRECTORY with a wheel of $1+cpu, or PIP_EXTRA_INDEX_URL=URL of an index that has them." \
        "To install the CUDA build all the same: ALLOW_CUDA_TORCH=1"
}

fingerprint() {
    { pwd && cat requirements/*.txt pyproject.toml scripts/setup.sh; } | cksum
}

if [ -x "$VENV/bin/prune-opd" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$(fingerprint)" ]; then
    exit 0
fi

check_python
if [ ! -e "$VENV" ]; then
    "$PYTHON" -m venv "$VENV" || fail "$PYTHON cannot make an environment: install its venv module (Debian: python$NEEDED-venv)"
fi
check_venv

pip_install() {
    "$VENV/bin/pip" install --quiet --disable-pip-version-check "$@"
}
torch=$(grep '^torch==' requirements/cpu.txt)
rm -f "$STAMP"
refuse_cuda "$torch"
echo "setup: $torch"
pip_install "$torch"
echo "setup: requirements/cpu.txt"
pip_install -r requirements/cpu.txt
echo "setup: requirements/cpu-nodeps.txt (without their dependencies)"
pip_install --no-deps -r requirements/cpu-nodeps.txt
echo "setup: prune-opd"
pip_install --no-deps --editable .
fingerprint >"$STAMP"
