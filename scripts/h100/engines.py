"""The engine of every recipe, up to vLLM's whole configuration, by the CUDA wheel on an H100 that is a stub.

`RolloutEngine` itself calls `LLM`, which here makes the configuration that the real one begins with, and ends there.
What the product counts on is asserted, and what a reader may want to know is printed.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from prune_opd.errors import ConfigError
from prune_opd.platform import Platform
from prune_opd.rollout.engine import ENVIRONMENT
from scripts.h100 import stub_h100

configurations: list[Any] = []


class Configured:
    """In place of `vllm.LLM`."""

    def __init__(self, **arguments: Any):
        from vllm.engine.arg_utils import EngineArgs
        from vllm.usage.usage_lib import UsageContext

        for ours in ("use_tqdm_on_load",):  # LLM's own
            arguments.pop(ours)
        configurations.append(EngineArgs(**arguments).create_engine_config(UsageContext.LLM_CLASS))


def model_of(config: Any, folder: Path) -> Path:
    """The student's config.json alone, with the class in it: without that vLLM does not know that it generates."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from prune_opd.rehearse.machine import write_model

    path = write_model(folder, config.student, "student", None) / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(
        json.dumps({"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[settings["model_type"]]], **settings})
    )
    return folder


def configured(config: Any, model: Path, rank: int, world: int) -> Any:
    """vLLM's configuration of this rank's engine."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from prune_opd import platform
    from prune_opd.rollout import engine

    options = engine.EngineOptions(config.memory.sleep_level, 32, config.parallel.timeout_minutes)
    longest = max(config.horizon.max_len, config.evaluation.max_len or 0)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    machine = Platform("cuda", torch.device("cuda", rank % 8), "nccl")
    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank % 8), "WORLD_SIZE": str(world)}
    try:
        with (
            mock.patch.dict("os.environ", {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}),
            mock.patch("vllm.LLM", Configured),
            mock.patch.object(platform, "prepare", lambda: machine),
            mock.patch.object(engine, "_answer_within", lambda seconds: None),  # of groups that are not there
        ):
            engine.RolloutEngine(str(model), config.rollout, longest, torch.bfloat16, machine, options)
    finally:
        dist.destroy_process_group()
    return configurations[-1]


def line(name: str, config: Any, found: Any) -> str:
    """What an engine is like. AssertionError where it is not as the product takes it to be."""
    from vllm.platforms import current_platform

    assert current_platform.is_cuda(), current_platform
    rollout, scheduler, compilation = config.rollout, found.scheduler_config, found.compilation_config
    quantization = found.quant_config
    assert (quantization is None) == (rollout.quantization is None), quantization
    assert found.parallel_config.tensor_parallel_size == rollout.tensor_parallel
    assert found.parallel_config.distributed_executor_backend == "external_launcher"
    assert found.cache_config.gpu_memory_utilization == rollout.gpu_memory_utilization
    assert bool(found.model_config.enable_sleep_mode) == (config.memory.sleep_level > 0)
    assert not found.kernel_config.enable_flashinfer_autotune
    assert not found.use_v2_model_runner
    assert scheduler.async_scheduling, "docs/gpu.md (3) says that engines schedule asynchronously on a GPU"
    assert scheduler.max_num_seqs == rollout.max_num_seqs
    if rollout.head_dtype == "fp32":
        assert found.model_config.head_dtype == torch.float32
    method = "bf16" if quantization is None else f"{type(quantization).__name__} for {rollout.quantization}"
    return (
        f"{name}: TP {rollout.tensor_parallel}, {method}, head {found.model_config.head_dtype}, "
        f"asynchronous scheduling, prefill of {scheduler.max_num_batched_tokens} tokens at once "
        f"(chunked {scheduler.enable_chunked_prefill}), prefix cache {found.cache_config.enable_prefix_caching}, "
        f"{compilation.cudagraph_mode.name} graphs of up to {max(compilation.cudagraph_capture_sizes or [0])} rows"
    )


def main() -> None:
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as folder:
        stub_h100.install(Path(folder))
        print(f"stubs: the driver, the platform, {', '.join(stub_h100.FLASH)}")
        from prune_opd.config import TrainConfig
        from prune_opd.config.recipe import list_recipes, load_recipe

        for name in list_recipes():
            config = load_recipe(name)
            if not isinstance(config, TrainConfig):
                continue
            if config.planning.gpu == "cpu":  # a tiny pair, as it would be on a GPU
                config = replace(config, rollout=replace(config.rollout, quantization=None))
            try:
                model = model_of(config, Path(folder) / name)
            except ConfigError as error:
                print(f"{name}: {error}")
                continue
            world = config.planning.nodes * config.parallel.nproc
            print(line(name, config, configured(config, model, world - 1, world)), flush=True)


if __name__ == "__main__":
    main()
