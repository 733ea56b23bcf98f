"""Where a shard's numbers lie in the whole Hugging Face tensors: views only, nothing is copied.

    for source, target in zip(shard_views(…), place_views(…)):  target.copy_(source)

over all shards makes the whole tensors, as `mapping.merge_shards` does; each pair can be copied, sent and summed by
itself. Sources of "qkv" are strided (megatron keeps q, k and v of a KV group together), targets of "columns" are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from prune_opd.weights.mapping import Entry

if TYPE_CHECKING:
    from prune_opd.model_spec import ModelSpec


def shard_views(entry: Entry, spec: ModelSpec, shard: Tensor, index: int, count: int) -> tuple[Tensor, ...]:
    """Shard `index` of `count`, split into its part of each of the entry's Hugging Face tensors."""
    if entry.cut == "gate_up":
        return tuple(shard.chunk(2))
    if entry.cut == "qkv":
        sizes = [n * spec.head_dim for n in (spec.heads // spec.kv_heads, 1, 1)]
        return tuple(shard.unflatten(0, (spec.kv_heads // count, sum(sizes))).split(sizes, dim=1))
    if entry.cut == "vocab":
        begin, end = _vocabulary(spec, index, count)
        return (shard[: end - begin],)  # the rest is padding
    return (shard,)


def place_views(entry: Entry, spec: ModelSpec, wholes: Sequence[Tensor], index: int, count: int) -> tuple[Tensor, ...]:
    """The same parts in the whole tensors, in the shapes of `shard_views`."""
    if entry.cut == "gate_up":
        return tuple(whole.chunk(count)[index] for whole in wholes)
    if entry.cut == "qkv":
        groups = spec.kv_heads // count
        return tuple(whole.unflatten(0, (spec.kv_heads, -1)).narrow(0, index * groups, groups) for whole in wholes)
    if entry.cut == "vocab":
        begin, end = _vocabulary(spec, index, count)
        return (wholes[0][begin:end],)
    if entry.cut == "columns":
        return (wholes[0].chunk(count, dim=1)[index],)
    return (wholes[0],)


def _vocabulary(spec: ModelSpec, index: int, count: int) -> tuple[int, int]:
    """First and end row of a shard, without the rows that only pad the vocabulary."""
    rows = spec.padded_vocab(count) // count
    return min(index * rows, spec.vocab_size), min((index + 1) * rows, spec.vocab_size)
