#!/usr/bin/env bash
# The pinned Python packages, into the environment whose bin/ is first on the path.
#   install_python.sh h100|cpu FOLDER_WITH_THE_PINS
# Of h100, in the environment:
#   CUDA_HOME     of the compiler (default: /usr/local/cuda; where that is not, the pins' own: they bring nvcc)
#   WHEELS        a folder that keeps what is compiled; what lies there is not compiled again
#   APEX_SOURCE   a checkout of NVIDIA's apex (default: it is fetched from its repository); none: do without its kernel
set -euo pipefail
accel=$1
pins=$2

install() {
    python -m pip install --no-cache-dir --disable-pip-version-check "$@"
}

if [ "$accel" = cpu ]; then
    torch=$(grep '^torch==' "$pins/cpu.txt")
    install "$torch"
    install -r "$pins/cpu.txt"
    install --no-deps -r "$pins/cpu-nodeps.txt"
    exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
install -r "$pins/pins.h100.txt"
site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cuda=${CUDA_HOME:-/usr/local/cuda}
[ -x "$cuda/bin/nvcc" ] || cuda=$site/nvidia/cu13
export CUDA_HOME=$cuda PATH=$cuda/bin:$PATH
# The headers of the very libraries that torch loads, before those of the base image.
export CPATH="$site/nvidia/cu13/include:$site/nvidia/cudnn/include:$site/nvidia/nccl/include${CPATH:+:$CPATH}"
# Wheels have libraries by their versions only, and a linker asks for libcudart.so.
mkdir "$work/lib"
for library in "$site"/nvidia/cu13/lib/lib*.so.*; do
    name=$(basename "$library")
    ln -sfn "$library" "$work/lib/${name%%.so.*}.so"
done
export LIBRARY_PATH="$work/lib${LIBRARY_PATH:+:$LIBRARY_PATH}"
export NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE
export FLASH_ATTN_CUDA_ARCHS=90 TORCH_CUDA_ARCH_LIST=9.0
wheels=${WHEELS:-$work/wheels}
mkdir -p "$wheels"

compile() {
    python -m pip wheel --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation \
        --find-links "$wheels" --wheel-dir "$wheels" "$@"
}

# On Hopper Transformer Engine takes cuDNN's attention for packed rows. flash-attn would be compiled for hours and unused.
if [ -n "${FLASH_ATTN:-}" ]; then
    cp "$pins/pins.h100-build.txt" "$work/build.txt"
else
    grep -v '^flash-attn' "$pins/pins.h100-build.txt" >"$work/build.txt"
fi
compile -r "$work/build.txt"
install --no-deps --no-index --find-links "$wheels" -r "$work/build.txt"

# The package index's apex is another project. NVIDIA's comes from its repository only, at one commit.
kernel=fused_weight_gradient_mlp_cuda
commit=$(cat "$pins/apex.commit")
export KERNEL_VERSION=0.1+${commit:0:10}
if [ "${APEX_SOURCE:-}" != none ] && ! compgen -G "$wheels/$kernel-$KERNEL_VERSION-*.whl" >/dev/null; then
    source=${APEX_SOURCE:-$work/apex}
    if [ ! -d "$source" ]; then
        git init --quiet "$source"
        git -C "$source" fetch --quiet --depth 1 https://github.com/NVIDIA/apex.git "$commit"
        git -C "$source" checkout --quiet FETCH_HEAD
    fi
    mkdir "$work/kernel"
    cp -r "$source/csrc" "$work/kernel/csrc"
    cp "$pins/apex_kernel.py" "$work/kernel/setup.py"
    compile "$work/kernel"
fi
if [ "${APEX_SOURCE:-}" = none ]; then
    echo "note: left out: apex's $kernel" >&2
else
    install --no-deps --no-index --find-links "$wheels" "$kernel==$KERNEL_VERSION"
    python -c "import torch, $kernel"
fi
# What megatron-core needs is imported once here: a package that lacks one of its own must not wait for the first run.
python -c 'import transformer_engine.pytorch, megatron.core, pyarrow'
