"""Kernels that a GPU has and this machine has not, as far as a rehearsal sees them: shapes, bytes, no waits.

Attention is torch's operator of flash attention, which keeps what Transformer Engine's keeps, on all rows of a packed
batch at once; where context-parallel ranks share the rows, `_RingAttention`. RMSNorm is one kernel in
torch and in Transformer Engine; without numbers torch takes it apart, in fp32. Norm and scaling of all gradients are
one kernel in Transformer Engine; megatron-core's replacement waits for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def of_a_gpu() -> Iterator[None]:
    from megatron.core.optimizer import clip_grads

    from prune_opd.megatron.local_layers import PackedSdpaAttention

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(PackedSdpaAttention, "forward", _attention))
        stack.enter_context(mock.patch.object(F, "rms_norm", _rms_norm))
        stack.enter_context(mock.patch.object(clip_grads, "l2_norm_impl", _norm))
        stack.enter_context(mock.patch.object(clip_grads, "multi_tensor_scale_impl", _scale))
        yield


def _attention(layer: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """[N, heads/tp, D] and [N, kv_heads/tp, D] twice -> [N, heads/tp * D]. The teacher's layers have no such ranks."""
    from megatron.core import parallel_state

    if layer.config.context_parallel_size > 1:
        out: Tensor = _RingAttention.apply(query, key, value, parallel_state.get_context_parallel_group())
        return out.flatten(1)
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=layer.softmax_scale)
    return found[0][0].transpose(0, 1).flatten(1)


class _RingAttention(torch.autograd.Function):
    """What Transformer Engine's `AttnFuncWithCPAndKVP2P` allocates, sends and keeps (2.11, fused attention in bf16).

    A rank has a piece from the front of each row and one from its back. Keys and values go round the ranks. Each step
    attends to those that have come: on a rank's own and earlier ranks' with all queries, on later ones with the second
    half of them. All that have come and all partial results are there until the last one is added up.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
        rank, size, heads = group.rank(), group.size(), q.shape[1]
        came = [torch.cat([k.reshape(-1), v.reshape(-1)])]
        parts, sums = [], []
        for step in range(size):
            if step < size - 1:
                came.append(torch.empty_like(came[0]))
                _pass_on(came[step], came[step + 1], group)
            rows = len(q) if step <= rank else len(q) // 2
            parts.append(q.new_empty(rows, heads, q.shape[2]))
            sums.append(q.new_empty(heads, rows, dtype=torch.float32))
        out, normaliser = torch.zeros_like(q), torch.clone(sums[0])
        ctx.save_for_backward(q, came[-1], out, normaliser)
        ctx.group, ctx.shapes = group, (k.shape, v.shape)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, kv, _, _ = ctx.saved_tensors
        rank, size, shapes = ctx.group.rank(), ctx.group.size(), ctx.shapes
        gradient = torch.empty_like(q)
        buffers = [kv.new_empty(2, *kv.shape) for _ in range(2)]  # keys and values, and what is known of their gradient
        for step in range(size):
            here, there = buffers[step % 2], buffers[(step + 1) % 2]
            if step == 0:
                _pass_on(here[0], there[0], ctx.group)
            elif step == size - 1:
                _pass_on(here[1], there[1], ctx.group)
            else:
                _pass_on(here, there, ctx.group)
            rows = len(q) if step >= size - 1 - rank else len(q) // 2
            _ = q.new_empty(rows, *q.shape[1:]), torch.empty_like(kv)  # this step's part of the gradients
        of_keys, of_values = buffers[size % 2][1].split([shapes[0].numel(), shapes[1].numel()])
        return gradient, of_keys.view(shapes[0]), of_values.view(shapes[1]), None


def _pass_on(mine: Tensor, buffer: Tensor, group: dist.ProcessGroup) -> None:
    """To the next rank of the ring, and from the one before; even ranks send first."""
    rank, ranks = group.rank(), dist.get_process_group_ranks(group)
    after, before = ranks[(rank + 1) % len(ranks)], ranks[(rank - 1) % len(ranks)]
    messages = [dist.P2POp(dist.isend, mine, after, group), dist.P2POp(dist.irecv, buffer, before, group)]
    for work in dist.batch_isend_irecv(messages if rank % 2 == 0 else messages[::-1]):
        work.wait()


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
