"""vLLM's RMSNorm kernel in an engine on a CPU, which runs eight torch operations in its place.

vLLM's CPU build has the kernel and offers it to GPUs alone. Here it is one more implementation in vLLM's registry
(`vllm.ir`), and an engine prefers it. A compiled engine does not: its compiler fuses the torch operations with theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PROVIDER = "prune_opd_cpu"  # its name in vLLM's registry
OPERATIONS = ("rms_norm", "fused_add_rms_norm")


def engine_arguments() -> dict[str, Any]:
    """Of vLLM's `LLM`: the kernel is used where an operation's arguments fit it. Call it before the engine is built."""
    from vllm import ir

    if PROVIDER not in ir.ops.rms_norm.impls:
        ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_fits)(_rms_norm)
        ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_sum_fits, inplace=True)(_fused_add_rms_norm)
    return {"kernel_config": {"ir_op_priority": {name: [PROVIDER] for name in OPERATIONS}}}


# vLLM holds the arguments of all four against its own operations': names and defaults must be the same.


def _fits(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return variance_size is None and weight is not None and weight.dtype == x.dtype


def _sum_fits(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _fits(x, weight, epsilon, variance_size) and x.is_contiguous() and x_residual.is_contiguous()


def _rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    normed = x.new_empty(x.shape)
    torch.ops._C.rms_norm(normed, x.contiguous(), weight, epsilon)  # queries and keys are parts of one product's rows
    return normed


def _fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual
