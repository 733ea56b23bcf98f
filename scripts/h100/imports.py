"""Everything that the image runs, imported into one process; and what the product finds there."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import warnings

from prune_opd import platform

THEIRS = ("transformer_engine.pytorch", "flashinfer", "vllm", "pyarrow", "reasoning_gym", "tensorboardX", "datasets")
KERNEL = "fused_weight_gradient_mlp_cuda"
OTHERS = ("prune_opd.__main__", "prune_opd.cli.__main__")  # programs: importing one runs it


def compiled() -> bool:
    """Whether Transformer Engine's PyTorch half is here, which `make setup-h100` compiles."""
    try:
        return bool(importlib.metadata.version("transformer-engine-torch"))
    except importlib.metadata.PackageNotFoundError:
        return False


def modules(package: str) -> list[str]:
    """Its modules, and those of the packages in it."""
    path = importlib.import_module(package).__path__
    return [found.name for found in pkgutil.walk_packages(path, f"{package}.") if found.name not in OTHERS]


def main() -> None:
    warnings.simplefilter("ignore")
    if not compiled():
        from tests.te import stub

        stub.install()
        print("transformer_engine_torch is NOT COMPILED here: a stub of the tests takes its place, with the real enums")
    platform.prepare()
    for name in ("megatron.core", *THEIRS):
        importlib.import_module(name)
    ours = modules("prune_opd")
    for name in ours:
        importlib.import_module(name)
    print(f"{', '.join(('megatron.core', *THEIRS))}, and {len(ours)} modules of ours")

    import torch
    from megatron.core.extensions import transformer_engine as engine

    from prune_opd.check.precision import transformer_engine_problem
    from prune_opd.megatron.model import HAVE_TE, fusions, gradient_fusion

    assert torch.version.cuda, "a CPU build of torch"
    assert engine.HAVE_TE and HAVE_TE and transformer_engine_problem() is None
    print(f"torch for CUDA {torch.version.cuda}; megatron-core takes Transformer Engine's layers: {HAVE_TE}")
    found = [name for name, value in fusions(HAVE_TE, True).items() if value]
    found += [name for name, value in gradient_fusion(on_gpu=True).items() if value]
    print(f"kernels that a model on a GPU would have here: {', '.join(found)}")
    if importlib.util.find_spec(KERNEL) is None:
        print(f"{KERNEL} is not installed here")
        return
    kernel = importlib.import_module(KERNEL)
    assert callable(kernel.wgrad_gemm_accum_fp32) and "gradient_accumulation_fusion" in found
    from megatron.core.tensor_parallel import layers

    assert layers._grad_accum_fusion_available, "megatron-core does not find apex's kernel"
    print("apex's kernel is imported, and megatron-core finds it")


if __name__ == "__main__":
    main()
