"""A checkpoint's plan: which bytes a rank writes, and what its host needs for it, with nothing written.

As in megatron/shards.py: what several replicas hold is dealt out among them by megatron-core, which asks each what it
has. The other ranks are not here; what they have follows from what this rank has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

AS_HELD = ".gbuf_idx_"  # in the names of optimizer shards that are saved as a rank holds them


@dataclass(frozen=True)
class Saving:
    """Bytes of one rank's part in a checkpoint.

    device: of its tensors on the device. gathered: of those on the host. written: what it writes of both. host: what
    the host needs at its peak, which is what was gathered and a copy of what is written: the writers have their own, so
    that training can go on.
    """

    device: int
    gathered: int
    written: int
    host: int


def saving_of(state: Any, groups: Any) -> Saving:
    """That of a sharded state dict. groups: of the student."""
    shards = list(_shards(state))
    mine = _dealt(state, groups)
    storages = {
        s.data.untyped_storage()._cdata: s.data.untyped_storage().nbytes() for s in shards if not s.data.is_meta
    }
    device = sum(shard.data.nbytes for shard in shards if shard.data.is_meta)
    copied = sum(
        shard.data.nbytes
        for shard in mine
        if shard.data.is_meta or shard.data.untyped_storage().nbytes() != shard.data.nbytes
    )
    gathered = sum(storages.values())
    return Saving(device, gathered, sum(shard.data.nbytes for shard in mine), gathered + copied)


def _shards(state: Any) -> Iterator[Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    apply_factories(state)
    for value in nested_values(state):
        if isinstance(value, ShardedTensor) and isinstance(value.data, Tensor):
            yield value


def _dealt(state: Any, groups: Any) -> list[Any]:
    """The shards that this rank writes."""
    from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
    from megatron.core.dist_checkpointing.mapping import is_main_replica
    from megatron.core.dist_checkpointing.utils import _sharded_tensor_shard_id

    group = groups.dp_cp
    if group.size() == 1:
        return [shard for shard in _shards(state) if is_main_replica(shard.replica_id)]
    ranks, experts = dist.get_process_group_ranks(group), groups.ep.size()

    def answered(everyone: list[Any], ours: list[Any], group: Any) -> None:
        for place, rank in enumerate(ranks):
            everyone[place] = ours if place == group.rank() else [_of_peer(one, place, rank, experts) for one in ours]

    with mock.patch.object(dist, "all_gather_object", answered):
        found = determine_main_replica_uniform_distribution(state, group)
    assert found is not None
    writer = found.main_rank_for_shard
    return [shard for shard in _shards(state) if writer.get(_sharded_tensor_shard_id(shard)) == group.rank()]


def _of_peer(shard: Any, place: int, rank: int, experts: int) -> Any:
    """What another replica has where this one has `shard`. place: its own in the group. experts: ranks that share them.

    The same, or other experts, or its own part of the optimizer.
    """
    if AS_HELD in shard.key:
        return replace(shard, key=f"{shard.key} of replica {place}", replica_id=shard.replica_id)
    if ".experts." in shard.key:
        replica_id = (*shard.replica_id[:-1], rank // experts)
        same = rank % experts == dist.get_rank() % experts
        return replace(shard, key=shard.key if same else f"{shard.key} of {rank % experts}", replica_id=replica_id)
    return replace(shard, replica_id=(*shard.replica_id[:-1], place))
