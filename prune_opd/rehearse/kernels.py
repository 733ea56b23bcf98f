"""Kernels that a GPU has and this machine has not, as far as a rehearsal sees them: shapes, bytes, no waits.

Attention is torch's operator of flash attention, which keeps what Transformer Engine's keeps. RMSNorm is one kernel in
torch and in Transformer Engine; without numbers torch takes it apart, in fp32. Norm and scaling of all gradients are
one kernel in Transformer Engine; megatron-core's replacement waits for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def of_a_gpu() -> Iterator[None]:
    from megatron.core.optimizer import clip_grads

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _flash_attention))
        stack.enter_context(mock.patch.object(F, "rms_norm", _rms_norm))
        stack.enter_context(mock.patch.object(clip_grads, "l2_norm_impl", _norm))
        stack.enter_context(mock.patch.object(clip_grads, "multi_tensor_scale_impl", _scale))
        yield


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float | None, **_: Any) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[0]


class _RmsNorm(torch.autograd.Function):
    """Keeps its input and a number in fp32 for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    normed: Tensor = _RmsNorm.apply(x, weight)
    return normed


def _norm(chunk: int, overflow: Tensor, tensors: list[list[Tensor]], *_: Any) -> tuple[Tensor, None]:
    """One number [1] of all gradients together."""
    return torch.stack([gradient.flatten()[:1].sum() for gradient in tensors[0]]).norm()[None].float(), None


def _scale(chunk: int, overflow: Tensor, tensors: list[list[Tensor]], scale: float) -> None:
    for source, result in zip(*tensors, strict=True):
        result.copy_(source)
