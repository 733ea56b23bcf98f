"""The setup.py of one extension of NVIDIA's apex: a weight's gradient, added to an fp32 buffer by its matrix product.

Beside Transformer Engine megatron-core takes nothing else of apex. apex's own setup.py compiles nine more extensions,
refuses an nvcc of another minor version than torch's CUDA, and installs a package `apex`, which is not needed here.
install_python.sh puts this file beside the csrc/ of a checkout. sm90 only, as TORCH_CUDA_ARCH_LIST says there.
"""

import os
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CUDAExtension

NAME = "fused_weight_gradient_mlp_cuda"  # by which megatron-core imports it
SOURCES = ("", "_cuda", "_16bit_prec_cuda")
# The pins' nvcc is 13.5, torch's headers are 13.0, and CCCL refuses the two together. There is no kernel in here, only
# calls of cuBLAS.
NVCC = ["-O3", "--expt-relaxed-constexpr", "--expt-extended-lambda", "-DCCCL_DISABLE_CTK_COMPATIBILITY_CHECK"]

setup(
    name=NAME,
    version=os.environ["KERNEL_VERSION"],
    packages=[],
    py_modules=[],
    ext_modules=[
        CUDAExtension(
            NAME,
            [f"csrc/megatron/fused_weight_gradient_dense{part}.{'cu' if part else 'cpp'}" for part in SOURCES],
            include_dirs=[str(Path(__file__).resolve().parent / "csrc")],
            extra_compile_args={"cxx": ["-O3"], "nvcc": NVCC},
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
