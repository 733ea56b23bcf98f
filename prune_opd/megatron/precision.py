"""Number formats as arguments of megatron-core. Plain functions of the settings: no torch, no megatron.

megatron-core ignores `fp8=` and `tp_comm_overlap=` without a word where Transformer Engine is missing, and accepts
recipes that the GPU does not have: check/precision.py refuses them before.
"""

from __future__ import annotations

from typing import Any

from prune_opd.config import Fp8Config

GEMM_MULTIPLE = 16  # Transformer Engine: last dimension % 16, and the tokens are the last one in the weight's gradient
BLOCK = 128  # of the blockwise recipe
NO_FP8 = Fp8Config()


def transformer_arguments(fp8: Fp8Config) -> dict[str, Any]:
    """Of megatron-core's `TransformerConfig`; empty without FP8."""
    if not fp8.on:
        return {}
    ends = (fp8.first_layers_bf16, fp8.last_layers_bf16)
    return {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "fp8_param": fp8.param,
        "fp8_amax_history_len": fp8.amax_history,
        "fp8_amax_compute_algo": "max",
        # Weights are quantised anew for every pass. Kept, their FP8 copies would take half of the models' memory again,
        # in every phase, since they are no parameters that could move away.
        "disable_parameter_transpose_cache": not fp8.param,
        "first_last_layers_bf16": any(ends),
        "num_layers_at_start_in_bf16": ends[0],
        "num_layers_at_end_in_bf16": ends[1],
    }


def optimizer_arguments(fp8: Fp8Config) -> dict[str, Any]:
    """Of megatron-core's `OptimizerConfig`: how it writes the master weights back into FP8 parameters."""
    return {"fp8_recipe": fp8.recipe} if fp8.on else {}


def ddp_arguments(fp8: Fp8Config) -> dict[str, Any]:
    """Of megatron-core's `DistributedDataParallelConfig`: FP8 parameters are gathered as they are."""
    return {"fp8_param_gather": True} if fp8.on and fp8.param else {}


def token_multiple(recipe: str | None, tensor: int, sequence_parallel: bool) -> int:
    """What the tokens of a packed micro-batch must be a multiple of, with FP8 of this recipe or without (None).

    Sequence parallelism cuts the tokens over the TP ranks; each then quantises its own, blockwise in whole blocks.
    """
    cuts = tensor if sequence_parallel else 1
    if recipe is None:
        return cuts
    return cuts * (BLOCK if recipe == "blockwise" and cuts > 1 else GEMM_MULTIPLE)
