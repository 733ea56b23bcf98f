"""The process of test_formats.py: the settings in real config objects, and one engine with FP8 weights and cache.

    python worker_formats.py MODELS OUT

Writes OUT/formats.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import torch

from prune_opd import platform
from prune_opd.check.precision import has_wide_vectors
from prune_opd.config import Fp8Config, ParallelConfig, RolloutConfig
from prune_opd.config.rollout import KV_CACHE_DTYPES, QUANTIZATIONS
from prune_opd.errors import UserError
from prune_opd.megatron.precision import ddp_arguments, optimizer_arguments, transformer_arguments
from prune_opd.rollout.engine import rollout_arguments
from prune_opd.rollout.request import TokenSampling, new_rows
from tests.rollout.worker_engine import make_prompts

FP8S = {
    "off": Fp8Config(recipe="delayed", param=True, amax_history=7),
    "delayed": Fp8Config("hybrid", "delayed", amax_history=7),
    "tensorwise": Fp8Config("e4m3", "tensorwise", first_layers_bf16=1, last_layers_bf16=2),
    "blockwise": Fp8Config("e4m3", "blockwise", param=True, last_layers_bf16=1),
}
MAX_TOKENS = 24


def read_back(settings: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in names}


def megatron_settings(models: Path, layout: Any) -> dict[str, Any]:
    """Each FP8 setting through the real config classes, and what of it arrives."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    from prune_opd.megatron.model import transformer_config
    from prune_opd.model_spec import ModelSpec

    spec = ModelSpec.read(models / "student")
    names = tuple(field.name for field in fields(TransformerConfig) if "fp8" in field.name or "bf16" in field.name)
    found = {}
    for name, fp8 in FP8S.items():
        config = transformer_config(spec, layout.student, torch.bfloat16, **transformer_arguments(fp8))
        found[name] = {
            "transformer": read_back(config, names),
            "params_dtype": str(config.params_dtype),
            "optimizer": OptimizerConfig(min_lr=0.0, **optimizer_arguments(fp8)).fp8_recipe,
            "ddp": DistributedDataParallelConfig(**ddp_arguments(fp8)).fp8_param_gather,
        }
    return found


def vllm_settings(models: Path) -> dict[str, Any]:
    from vllm.config.cache import CacheDType
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    found = {}
    for rollout, sleep_level in (
        (RolloutConfig(), 0),
        (RolloutConfig(quantization="fp8", kv_cache_dtype="fp8_e5m2"), 1),
        (RolloutConfig(quantization="fp8_per_block", kv_cache_dtype="fp8"), 2),
    ):
        arguments = EngineArgs(str(models / "student"), dtype="bfloat16", **rollout_arguments(rollout, sleep_level))
        found[f"{rollout.quantization}, {rollout.kv_cache_dtype}"] = [
            arguments.quantization,
            arguments.kv_cache_dtype,
            arguments.enable_sleep_mode,
        ]
    return {
        "arrived": found,
        "unknown": [*set(QUANTIZATIONS) - {*QUANTIZATION_METHODS}, *set(KV_CACHE_DTYPES) - {*get_args(CacheDType)}],
    }


def fp8_of_local_layers(models: Path, layout: Any) -> str:
    """What building a model says when FP8 is asked for and there is no Transformer Engine."""
    from prune_opd.megatron.model import build

    try:
        settings = transformer_arguments(FP8S["delayed"])
        build(models / "student", layout.student, torch.bfloat16, trainable=False, settings=settings)
    except UserError as reason:
        return str(reason)
    return ""


class Engine:
    """A real engine with FP8 weights and, where the CPU can, an FP8 cache; the trainer's models beside it."""

    def __init__(self, models: Path, layout: Any, machine: platform.Platform):
        from prune_opd.megatron.model import build
        from prune_opd.rollout.engine import EngineOptions, RolloutEngine

        kv_cache = "fp8" if has_wide_vectors() else "auto"  # vLLM refuses it on other CPUs
        rollout = RolloutConfig(
            max_prompt_len=256, max_num_seqs=8, quantization="fp8_per_channel", kv_cache_dtype=kv_cache
        )
        self.layout, self.device = layout, machine.device
        options = EngineOptions(sleep_level=2)
        self.engine = RolloutEngine(str(models / "student"), rollout, 64, torch.bfloat16, machine, options)
        self.student, self.teacher = (
            build(models / name, layout.student, torch.bfloat16, trainable=False) for name in ("student", "teacher")
        )

    def load(self, chunks: Any) -> None:
        from prune_opd.weights.stream import Resharder

        self.engine.load(Resharder(chunks, in_order=True).stream())

    def tokens(self) -> list[list[int]]:
        rollouts = self.engine.generate(new_rows(make_prompts(), 2, MAX_TOKENS), TokenSampling(seed=3, step=1))
        return [list(response.ids) for response in rollouts.responses]

    def difference(self, chunks: Any) -> float:
        """Mean difference of the sampled tokens' log-probabilities from a bf16 model of the trainer [nats]."""
        from prune_opd.megatron.logprobs import sampled_logprobs

        sampling = TokenSampling(seed=3, step=1, logprobs=True)
        rollouts = self.engine.generate(new_rows(make_prompts(), 4, MAX_TOKENS), sampling)
        theirs = [logprob for response in rollouts.responses for logprob in response.logprobs or ()]
        ours = sampled_logprobs(chunks, rollouts, self.layout, self.device)
        return sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(theirs)

    def weight_dtypes(self) -> list[str]:
        def dtypes(worker: Any) -> list[str]:
            model: Any = worker.model_runner.get_model()
            return sorted({str(layer.mlp.down_proj.weight.dtype) for layer in model.model.layers})

        return [name for names in self.engine.llm.collective_rpc(dtypes) for name in names]


def main(models: Path, out: Path) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts

    layout = layouts.initialize(ParallelConfig(), machine, seed=0)
    results: dict[str, Any] = {
        "megatron": megatron_settings(models, layout),
        "local layers": fp8_of_local_layers(models, layout),
    }
    engine = Engine(models, layout, machine)
    results["vllm"] = vllm_settings(models)
    results["sleep on the CPU"] = engine.engine.sleep_level
    results["weights"] = engine.weight_dtypes()
    engine.load(engine.student)
    results["tokens"] = engine.tokens()
    results["difference"] = engine.difference(engine.student)
    results["difference of other weights"] = engine.difference(engine.teacher)
    engine.load(engine.teacher)
    results["tokens of other weights"] = engine.tokens()
    results["difference after a reload"] = engine.difference(engine.teacher)
    engine.load(engine.student)
    results["tokens after a reload"] = engine.tokens()
    (out / "formats.json").write_text(json.dumps(results))
    engine.engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
