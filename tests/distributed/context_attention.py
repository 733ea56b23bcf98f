"""A core attention for context-parallel ranks on the CPU, so that everything around Transformer Engine's can run.

Transformer Engine brings the attention that passes keys and values on from rank to rank, and it runs on a GPU only.
This one gathers them on every rank, which gives the same numbers. It stands in for that one module in tests; what gets
tested is the rest: how tokens are shared, rotary embeddings, loss, gate, gradients.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from prune_opd.megatron.local_layers import PackedSdpaAttention
from prune_opd.megatron.packing import zigzag


class _Gather(torch.autograd.Function):
    """All ranks' tensors, stacked; a rank's gradient is the sum of what all ranks have made of its tensor."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: Any) -> Tensor:
        ctx.group = group
        all_of_them = mine.new_empty(dist.get_world_size(group), *mine.shape)
        dist.all_gather(list(all_of_them.unbind()), mine.contiguous(), group=group)
        return all_of_them

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


class GatheredSdpaAttention(PackedSdpaAttention):
    """PackedSdpaAttention whose queries are a rank's own, and whose keys and values are all ranks'."""

    def __init__(self, *args: Any, pg_collection: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """As PackedSdpaAttention, for this rank's tokens of `zigzag`."""
        if self.group.size() == 1:
            return super().forward(query, key, value, attention_mask, packed_seq_params)
        assert packed_seq_params is not None
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        rank, ranks = self.group.rank(), self.group.size()
        segments = [end - begin for begin, end in pairwise(bounds)]
        order = torch.tensor([token for r in range(ranks) for token in zigzag(segments, r, ranks)])
        keys, values = (_Gather.apply(x, self.group).flatten(0, 1)[order.argsort()] for x in (key, value))
        pieces, taken = [], 0
        for begin, end in pairwise(bounds):
            piece = (end - begin) // (2 * ranks)
            for number in (rank, 2 * ranks - 1 - rank):
                last = begin + (number + 1) * piece
                parts = query[taken : taken + piece], keys[begin:last], values[begin:last]
                q, k, v = (x.transpose(0, 1)[None] for x in parts)
                sees = torch.ones(piece, last - begin, dtype=torch.bool).tril(last - begin - piece)
                grouped = q.shape[1] != k.shape[1]
                out = F.scaled_dot_product_attention(q, k, v, sees, scale=self.softmax_scale, enable_gqa=grouped)
                pieces.append(out[0].transpose(0, 1).flatten(1))
                taken += piece
        return torch.cat(pieces)
