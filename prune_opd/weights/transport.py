"""How a bucket's shards come together on every rank of a group: through collectives, or through shared memory.

Both put the same shards where they belong in the same buckets (buckets.py). `send` takes one item after the other,
`depart` starts the bucket, `arrive` returns when it is complete on this rank; between the two the rank consumes the
bucket before. All ranks must call them in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.weights.buckets import Bucket, Item
from prune_opd.weights.checksum import copy_and_sum

# For each shard of an item what this rank has of it, one tensor for each Hugging Face tensor; None if it has nothing.
Held = Sequence[tuple[Tensor, ...] | None]


@dataclass
class Flight:
    """A bucket on its way. wholes: of each item, complete after `arrive`.

    sums: `bits_sum` of the parts of shards that were read to be sent, by (megatron name, shard index). loading: copies
    (place, source) before it departs. unloading: those after it has arrived. works: what to wait for in between.
    """

    wholes: list[tuple[Tensor, ...]] = field(default_factory=list)
    sums: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    loading: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    unloading: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    works: list[Any] = field(default_factory=list)


class Buffer:
    """A bucket's memory that knows whether someone still reads it: vLLM keeps what it cannot place yet.

    memory: [bytes] for the transport. lent: the same bytes for the consumer. It has a storage of its own, so that its
    references are the consumer's alone: a transport's threads let go of theirs when they please.
    """

    def __init__(self, memory: Tensor):
        self.memory, self.lent = memory, torch.from_dlpack(memory)
        self._unread = self._references()

    def _references(self) -> int:
        return torch._C._storage_Use_Count(self.lent.untyped_storage()._cdata)

    def is_read(self) -> bool:
        return self._references() > self._unread


class Transport(Protocol):
    staging: bool  # whether what a rank sends must lie together

    def allocate(self, nbytes: int) -> Tensor:
        """A buffer [bytes]. Collective."""

    def agree(self, busy: list[bool]) -> list[bool]:
        """Which buffers must not be written, when `busy` are those that this rank still reads. Collective."""

    def send(self, item: Item, held: Held, buffer: Buffer | None, flight: Flight) -> None: ...

    def depart(self, bucket: Bucket, buffer: Buffer | None, flight: Flight) -> None: ...

    def arrive(self, flight: Flight) -> None: ...


class Collectives:
    """One broadcast for each rank that sends something of a bucket: of its segment, to the group.

    Tensors that one rank has whole (norms, experts) arrive in their place. Shards are copied to where they belong once
    they have arrived, all of a bucket in one call. Many small broadcasts would cost more than their bytes: a model of
    128 experts has 19,000 tensors.

    A broadcast moves each byte once to each rank, as an all-gather does, but takes segments of unequal size; gloo's
    all-gather also fills a buffer of its own first, and takes four times as long. The broadcasts are asynchronous and
    start in the same order on every rank, so neither gloo's threads nor NCCL's stream can meet them in different
    orders. With NCCL `wait` makes the current stream wait, and a broadcast starts behind what the current stream has
    been given so far: a buffer is not overwritten before the copies out of it are done.
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

    def send(self, item: Item, held: Held, buffer: Buffer | None, flight: Flight) -> None:
        # What is received never goes into a live parameter, although another rank's replica may be one.
        undivided = _undivided(item, held) if item.everywhere or item.owners[0] == self.rank else None
        if item.at_home:
            flight.wholes.append(undivided or ())
            return
        assert buffer is not None
        wholes = item.wholes(buffer.memory)
        flight.wholes.append(item.wholes(buffer.lent) if undivided is None else undivided)
        for index, owner in enumerate(item.owners):
            places = item.slices(wholes, index)
            wires = item.wire(buffer.memory, index) if item.wires else places
            mine = held[index] if owner == self.rank or item.everywhere else None
            if mine is not None:
                flight.loading += zip(wires, mine, strict=True)
            if item.wires:
                flight.unloading += zip(places, wires, strict=True)

    def depart(self, bucket: Bucket, buffer: Buffer | None, flight: Flight) -> None:
        _copy(flight.loading)
        for sender, (begin, end) in sorted(bucket.segments.items()):
            assert buffer is not None
            wire = buffer.memory[begin:end]
            flight.works.append(dist.broadcast(wire, self.ranks[sender], group=self.group, async_op=True))

    def arrive(self, flight: Flight) -> None:
        for work in flight.works:
            work.wait()
        flight.works.clear()
        _copy(flight.unloading)


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy every source to its place, in few kernels on a GPU, and forget them."""
    if pairs:
        torch._foreach_copy_([place for place, _ in pairs], [source for _, source in pairs])
    pairs.clear()


class SharedMemory:
    """Ranks of one machine without accelerators: a bucket is one piece of memory that all of them have mapped.

    Each rank writes the shards that it owns, straight into the whole tensors, and all read the result where it is: a
    byte is copied once for the whole group, where a broadcast takes it through the kernel for each rank.
    """

    staging = False

    def __init__(self, group: Any):
        self.group, self.rank = group, group.rank()

    def allocate(self, nbytes: int) -> Tensor:
        """Anonymous memory: it goes when the last rank lets go of it, however the others end."""
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
        flags = torch.tensor(busy, dtype=torch.int32)
        if busy:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in flags.tolist()]

    def send(self, item: Item, held: Held, buffer: Buffer | None, flight: Flight) -> None:
        if item.at_home:
            flight.wholes.append(_undivided(item, held) or ())
            return
        assert buffer is not None
        wholes = item.wholes(buffer.memory)
        flight.wholes.append(item.wholes(buffer.lent))
        for index, owner in enumerate(item.owners):
            mine = held[index] if owner == self.rank else None
            if mine is not None:
                flight.sums[item.entry.megatron, index] = list(map(copy_and_sum, item.slices(wholes, index), mine))

    def depart(self, bucket: Bucket, buffer: Buffer | None, flight: Flight) -> None:
        """Nothing: every rank has written its part already."""

    def arrive(self, flight: Flight) -> None:
        dist.barrier(self.group)


def _undivided(item: Item, held: Held) -> tuple[Tensor, ...] | None:
    """The whole tensors where this rank's parameter already is them, without a copy; else None.

    What is merged for the stream goes into the buffer, so that it is let go of with the next bucket.
    """
    mine = held[0] if item.count == 1 and not item.entry.cut.groups and not item.merged else None
    return mine if mine is not None and all(part.is_contiguous() for part in mine) else None


def on_one_machine(group: Any) -> bool:
    """Whether all ranks see the same processes, so that they can map each other's memory. Collective."""
    here = (Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid"))
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, here, group=group)
    return all(other == here for other in everyone)
