"""How a bucket's shards come together on every rank of a group: through collectives, or through shared memory.

Both fill the same places of the same plan (plan.py). `send` starts a bucket, `arrive` returns when it is complete on this
rank; between the two the rank may consume the bucket before. Every rank of the group must call them in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.weights.plan import Bucket, Item, view

# (item, shard index) -> what this rank has of the shard, split as its Hugging Face tensors; None if it has not got it
Sources = Callable[[Item, int], tuple[Tensor, ...] | None]
# (item, whole tensors, shard index) -> the shard's part of each
Places = Callable[[Item, tuple[Tensor, ...], int], tuple[Tensor, ...]]


class Transport(Protocol):
    staging: bool

    def allocate(self, nbytes: int) -> Tensor: ...

    def agree(self, busy: list[bool]) -> list[bool]: ...

    def send(self, bucket: Bucket, buffer: Tensor, sources: Sources, places: Places) -> Any: ...

    def arrive(self, flight: Any) -> None: ...


class Collectives:
    """One broadcast per part of a shard, from the rank that owns it to the group, straight into the whole tensor.

    A broadcast moves each byte once to each rank, as an all-gather does, but leaves no second copy to be put in order:
    gloo's all-gather also fills a buffer of its own first, and takes four times as long. The broadcasts are
    asynchronous and start in the plan's order on every rank, so neither gloo's threads nor NCCL's stream can meet them in
    different orders. With NCCL, `wait` makes the current stream wait, and a broadcast starts behind what the current
    stream has been given so far: a buffer is not overwritten before the copies out of it are done.
    """

    staging = True

    def __init__(self, group: Any, device: torch.device):
        self.group, self.device = group, device
        self.rank = group.rank()
        self.ranks = dist.get_process_group_ranks(group)

    def allocate(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def agree(self, busy: list[bool]) -> list[bool]:
        return busy  # buffers are this rank's own

    def send(
        self, bucket: Bucket, buffer: Tensor, sources: Sources, places: Places
    ) -> list[tuple[Any, Tensor | None, Tensor]]:
        flight = []
        for item in bucket.items:
            if item.at_home:
                continue
            wholes = item.wholes(buffer)
            for index, owner in enumerate(item.owners):
                parts = places(item, wholes, index)
                mine = sources(item, index)
                if mine is not None:
                    for part, source in zip(parts, mine, strict=True):
                        part.copy_(source)
                if not item.everywhere and len(self.ranks) > 1:
                    flight += self._broadcast(item, index, owner, parts, mine, buffer)
        return flight

    def _broadcast(
        self,
        item: Item,
        index: int,
        owner: int,
        parts: tuple[Tensor, ...],
        mine: tuple[Tensor, ...] | None,
        buffer: Tensor,
    ) -> Iterator[tuple[Any, Tensor | None, Tensor]]:
        for i, part in enumerate(parts):
            wire, staged = part, None
            if not part.is_contiguous():  # gloo would silently deliver wrong numbers
                if mine is not None:
                    wire = mine[i].contiguous()
                else:
                    assert item.staging is not None
                    offset = item.staging + index * part.numel() * part.element_size()
                    wire = staged = view(buffer, offset, part.shape, part.dtype)
            if mine is not None and owner != self.rank:
                wire = wire.clone()  # a replica of the shard: what is sent must not be written over what is there
            yield dist.broadcast(wire, self.ranks[owner], group=self.group, async_op=True), staged, part

    def arrive(self, flight: list[tuple[Any, Tensor | None, Tensor]]) -> None:
        for work, staged, part in flight:
            work.wait()
            if staged is not None:
                part.copy_(staged)


class SharedMemory:
    """Ranks of one machine without accelerators: a bucket is one piece of memory that all of them have mapped.

    Each rank writes the shards that it owns, straight into the whole tensors, and all read the result where it is: a byte
    is copied once for the whole group, where a broadcast copies it out of, through and into memory for every rank.
    """

    staging = False

    def __init__(self, group: Any):
        self.group, self.rank = group, group.rank()

    def allocate(self, nbytes: int) -> Tensor:
        """Collective. Anonymous memory: it goes when the last rank lets go of it, whatever becomes of the others."""
        address: list[Any] = [None]
        if self.rank == 0:
            file = os.memfd_create("prune-opd-weights")
            os.ftruncate(file, nbytes)
            address[0] = f"/proc/{os.getpid()}/fd/{file}"
        dist.broadcast_object_list(address, group=self.group, group_src=0)
        buffer = torch.from_file(address[0], shared=True, size=nbytes, dtype=torch.uint8)
        dist.barrier(self.group)  # everyone has it open
        if self.rank == 0:
            os.close(file)
        return buffer

    def agree(self, busy: list[bool]) -> list[bool]:
        """Busy on any rank."""
        flags = torch.tensor(busy, dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in flags.tolist()]

    def send(self, bucket: Bucket, buffer: Tensor, sources: Sources, places: Places) -> None:
        for item in bucket.items:
            if item.at_home:
                continue
            wholes = item.wholes(buffer)
            for index, owner in enumerate(item.owners):
                if owner == self.rank:
                    mine = sources(item, index)
                    assert mine is not None
                    for part, source in zip(places(item, wholes, index), mine, strict=True):
                        part.copy_(source)

    def arrive(self, flight: None) -> None:
        dist.barrier(self.group)


def on_one_machine(group: Any) -> bool:
    """Whether all ranks see the same processes, so that they can map each other's memory. Collective."""
    here = (Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid"))
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, here, group=group)
    return all(other == here for other in everyone)
