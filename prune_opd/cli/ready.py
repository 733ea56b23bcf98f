"""What ranks import, imported once before they are forked (`ranks/forked.py`): 14 CPU seconds a rank otherwise.

    python -m prune_opd.ranks.launcher --ready prune_opd.cli.ready train/eager … -m prune_opd.cli.worker train …

The order is that of a rank. Nothing here may start a thread or initialize CUDA; where something does, the ranks are
new processes after all.
"""

from __future__ import annotations

import importlib
import os
import sys

from prune_opd.process import has_gpu, rank_environment, uncollected

# Every engine imports these before `platform.compiling`, which is for the model alone.
ENGINE = ("vllm", "vllm.v1.sample.sampler")
# What making an engine imports. vLLM compiles what is imported while its switch is on (`platform.compiling`), so ranks
# with compiled engines on a CPU import these themselves.
MAKING = (
    "vllm.v1.engine.llm_engine",
    "vllm.v1.core.kv_cache_manager",
    "vllm.distributed.device_communicators.cpu_communicator",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.model_executor.models.qwen3",
    "vllm.plugins.lora_resolvers.filesystem_resolver",
    "compressed_tensors",
    "transformers.models.qwen3.modeling_qwen3",
)
# What it imports beside them on a CPU: 150 modules, a CPU second a rank.
MAKING_ON_CPU = (
    "vllm.entrypoints.llm",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.plugins.lora_resolvers.hf_hub_resolver",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.model_executor.layers.quantization.compressed_tensors.utils",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.core.sched.scheduler",
)
WORKER = "vllm.v1.worker.cpu_worker"
REPLACES = "vllm.v1.worker.cpu.shm"  # imported by WORKER: replaces names of torch that no CPU has
# Of ours, by the command of `cli/worker.py`.
MODELS = ("prune_opd.megatron.trainer", "prune_opd.megatron.checkpoint")
OURS = {
    "train": (
        "prune_opd.run",
        "prune_opd.megatron.sync",
        "prune_opd.megatron.train_batch",
        "prune_opd.megatron.teacher",
        *MODELS,
        "prune_opd.eval.run",
    ),
    "eval": ("prune_opd.eval.run",),
    "sft": MODELS,
    "export": MODELS,
}
SAMPLE = ("train", "eval")  # they have an engine
EAGER = "eager"


@uncollected()
def get_ready(kind: str) -> None:
    """Import what the ranks of a command need.

    kind: train, eval, sft or export, and after a slash how vLLM runs the model: eager; compiled or unknown, for which
    only what is the same for all is imported on a CPU.
    """
    command, _, model = kind.partition("/")
    os.environ.update(rank_environment(os.environ))
    with_gpu = has_gpu()
    if with_gpu:  # torch then asks the driver's library for management for GPUs, which needs no context
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    from prune_opd import platform

    if with_gpu:
        platform.import_megatron()  # `prepare` would set a device
    else:
        platform.prepare()
    if command in SAMPLE:
        from prune_opd.rollout.engine import prepare_process

        prepare_process()
        _import(ENGINE)
        if with_gpu or model == EAGER:
            _import(MAKING)
        if not with_gpu and model == EAGER:
            _import_cpu_worker()
    _import(OURS[command])
    os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)


def _import(modules: tuple[str, ...]) -> None:
    for module in modules:
        importlib.import_module(module)


def _import_cpu_worker() -> None:
    """Import what making an engine on a CPU imports, and let vLLM put its CPU kernels in Triton's places.

    A rank has torch's own names until it makes an engine: the two modules that replace them are forgotten here, and so
    imported again there. Putting the kernels in place walks through all modules, .9 CPU seconds a rank, giving back
    what `gc.freeze` keeps costs as much when an engine is closed, and setting up vLLM's loggers .6: here all is done
    once.
    """
    import gc

    import torch
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging_if_needed
    from vllm.platforms import current_platform

    owners = (torch, torch.cuda, torch.accelerator, torch.Tensor)
    before = [dict(vars(owner)) for owner in owners]
    _import((WORKER, *MAKING_ON_CPU))
    current_platform.register_triton_kernel_overrides()
    configure_logging_if_needed(LoggingConfig())
    type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)
    gc.unfreeze = lambda: None
    for owner, names in zip(owners, before, strict=True):
        for name, value in list(vars(owner).items()):
            if name in names and value is not names[name]:
                setattr(owner, name, names[name])
            elif name not in names and owner is torch.Tensor:
                delattr(owner, name)
    for forgotten in (WORKER, REPLACES):
        parent, _, name = forgotten.rpartition(".")
        delattr(sys.modules[parent], name)
        del sys.modules[forgotten]
