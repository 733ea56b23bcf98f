#!/usr/bin/env bash
# The pinned Python packages, into the environment whose bin/ is first on the path.
#   install_python.sh h100|cpu FOLDER_WITH_THE_PINS
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

install -r "$pins/pins.h100.txt"
site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# The headers of the very libraries that torch loads, before those of the base image.
export CPATH="$site/nvidia/cu13/include:$site/nvidia/cudnn/include:$site/nvidia/nccl/include${CPATH:+:$CPATH}"
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
export NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE
export FLASH_ATTN_CUDA_ARCHS=90 TORCH_CUDA_ARCH_LIST=9.0
built=$(mktemp)
# On Hopper Transformer Engine takes cuDNN's attention for packed rows. flash-attn would be compiled for hours and unused.
if [ -n "${FLASH_ATTN:-}" ]; then
    cp "$pins/pins.h100-build.txt" "$built"
else
    grep -v '^flash-attn' "$pins/pins.h100-build.txt" >"$built"
fi
install --no-deps --no-build-isolation -r "$built"
rm "$built"
# The package index's apex is another project. NVIDIA's comes from its repository only, at one commit.
install --no-deps --no-build-isolation --config-settings '--build-option=--cpp_ext' \
    --config-settings '--build-option=--cuda_ext' "git+https://github.com/NVIDIA/apex.git@$(cat "$pins/apex.commit")"
# What megatron-core needs is imported once here: a package that lacks one of its own must not wait for the first run.
python -c 'import transformer_engine.pytorch, megatron.core, pyarrow'
python -c 'import fused_weight_gradient_mlp_cuda' || echo "note: apex has no fused_weight_gradient_mlp_cuda here" >&2
