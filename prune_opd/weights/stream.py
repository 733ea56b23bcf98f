"""The resharding stream: a megatron-core model's shards as whole Hugging Face tensors, on every rank, in buckets.

    mapping   which parameter holds which tensors, and how it is cut   mapping.py, cut.py
    buckets   who sends which shard, which tensors share a bucket      buckets.py    the same on all ranks, made once
    transport bring a bucket's shards together                         transport.py
    stream    send bucket i + 1, then hand on the tensors of bucket i, so that both go on at the same time
    checksum  of every shard as it was sent and as it was handed on    checksum.py

Every rank of the model-parallel group must draw its stream to the end. What it does with the tensors in between is its
own affair: the order of the collectives is the buckets'. Beyond what the consumer keeps, two buckets exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.process import progress
from prune_opd.weights.adapters import adapter_entries, has_adapter, merged, write_peft
from prune_opd.weights.buckets import Bucket, Holding, Item, make_buckets, make_items
from prune_opd.weights.checksum import Checksums
from prune_opd.weights.files import HfDirectoryWriter
from prune_opd.weights.mapping import Entry, ModelChunk, entries, local_parameters
from prune_opd.weights.transport import Buffer, Collectives, Flight, Held, SharedMemory, Transport, on_one_machine

MAX_FILE_BYTES = 5 * 2**30
MIB = 2**20
BUCKET_MB = 512
ADAPTER_FOLDER = "adapter"  # of an exported directory
# Tensors of a bucket that go to the consumer before the next bucket is sent. Its loops hold on to what they had last:
# vLLM's to a tensor of the layer before until they come to the next layer's q, k and v. Sent earlier, the next bucket
# would find that buffer taken, and there would be three.
LAG = 4


class Resharder:
    """The stream of one model, to be started as often as its weights change; buckets and buffers are kept.

    transport: "collective", "shared" (memory; on one machine without accelerators), or None for the best there is.
    in_order: the order of `entries`, for files; else the order in which the ranks are busiest (buckets.py). table: what
    is streamed; None: the model, its adapters merged into the weights that have one (adapters.py).
    """

    def __init__(
        self,
        chunks: Sequence[ModelChunk],
        bucket_mb: float = BUCKET_MB,
        transport: str | None = None,
        *,
        in_order: bool = False,
        table: Sequence[Entry] | None = None,
    ):
        self.chunks, self.bucket_bytes, self.in_order = chunks, int(bucket_mb * MIB), in_order
        self.table = list(entries(chunks[0].spec) if table is None else table)
        self.groups: Any = chunks[0].pg_collection
        self.device = next(chunks[0].parameters()).device
        # The ranks that hold one whole model between them: what the experts are divided over may be more than the rest.
        self.group = max(self.groups.mp, self.groups.tp_ep_pp, key=lambda group: group.size())
        self.transport = self._transport(transport)
        self._buffers: list[Buffer] = []
        self._handed_on = 0  # bytes of the stream under way

    @torch.no_grad()
    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole contiguous tensor), layer by layer. Collective, to be drawn to its end.

        A tensor may be a view of a live parameter or of a buffer: whoever keeps it must not write to it, and while it
        is kept its buffer is not used again. Raises `UserError` on all ranks if a tensor changed on its way.
        """
        parameters = local_parameters(self.chunks)
        sums = Checksums(self.buckets, self.group, self.device) if self.group.size() > 1 else None
        self._handed_on = 0
        now = self._send(self.buckets[0], parameters, sums, in_use=None)
        for bucket, after in zip(self.buckets, [*self.buckets[1:], None], strict=True):
            self.transport.arrive(now.flight)
            tensors = self._hand_on(bucket, now.flight, sums)
            yield from islice(tensors, LAG)
            ahead = self._send(after, parameters, sums, in_use=now.buffer) if after else None
            yield from tensors
            if ahead:
                now = ahead
        if sums:
            sums.compare()
        if self.device.type != "cpu":
            self.release()  # to the allocator, which has it ready for the next time; the CPU would fault it in again

    def release(self) -> None:
        """Let go of the buffers. On the CPU they are kept between two streams."""
        self._buffers.clear()

    @cached_property
    def buckets(self) -> list[Bucket]:
        """What travels together, in order. Collective, the first time."""
        parameters = local_parameters(self.chunks)
        here = {
            name: Holding(*entry.shard_of(self.groups), parameters[name].dtype, has_adapter(name, parameters))
            for entry in self.table
            if (name := entry.megatron) in parameters
        }
        holdings: list[Any] = [None] * self.group.size()
        dist.all_gather_object(holdings, here, group=self.group)
        return make_buckets(
            make_items(self.table, holdings), self.bucket_bytes, staging=self.transport.staging, in_order=self.in_order
        )

    @cached_property
    def _whole(self) -> int:
        """Bytes of all tensors."""
        items = (item for bucket in self.buckets for item in bucket.items)
        return sum(prod(shape) * item.dtype.itemsize for item in items for shape in item.entry.shapes)

    def _transport(self, name: str | None) -> Transport:
        if name is None:
            shared = self.device.type == "cpu" and self.group.size() > 1 and on_one_machine(self.group)
            name = "shared" if shared else "collective"
        return SharedMemory(self.group) if name == "shared" else Collectives(self.group, self.device)

    def _held(self, item: Item, parameters: Mapping[str, Tensor]) -> Held:
        shard = merged(item.entry.megatron, parameters, self.chunks[0].lora)
        mine, _ = item.entry.shard_of(self.groups)
        return [
            item.parts(shard, index) if shard is not None and index == mine else None for index in range(item.count)
        ]

    def _send(
        self, bucket: Bucket, parameters: Mapping[str, Tensor], sums: Checksums | None, in_use: Buffer | None
    ) -> _Sent:
        buffer = self._buffer(bucket.nbytes, in_use)
        flight = Flight()
        for item in bucket.items:
            held = self._held(item, parameters)
            self.transport.send(item, held, buffer, flight)
            for index, owner in enumerate(item.owners):
                mine = held[index]
                if sums is None or mine is None:
                    continue
                if owner != self.group.rank():
                    sums.held(item, index, mine)
                else:
                    sums.sent(item, index, mine, flight.sums.get((item.entry.megatron, index)))
        self.transport.depart(bucket, buffer, flight)
        return _Sent(buffer, flight)

    def _hand_on(self, bucket: Bucket, flight: Flight, sums: Checksums | None) -> Iterator[tuple[str, Tensor]]:
        for item, wholes in zip(bucket.items, flight.wholes, strict=True):
            yield from zip(item.entry.hf, wholes, strict=True)
            self._handed_on += sum(whole.nbytes for whole in wholes)
            progress(lambda: f"{self._handed_on / MIB:,.0f}/{self._whole / MIB:,.0f} MB")
            for index, owner in enumerate(item.owners):
                if sums and owner != self.group.rank():
                    sums.handed_on(item, index, item.slices(wholes, index))

    def _buffer(self, nbytes: int, in_use: Buffer | None) -> Buffer | None:
        """One that nobody reads any more, or a new one. None if none is needed."""
        busy = self.transport.agree([buffer is in_use or buffer.is_read() for buffer in self._buffers])
        if nbytes == 0:
            return None
        for buffer, taken in zip(self._buffers, busy, strict=True):
            if not taken and len(buffer.memory) >= nbytes:
                return buffer
        usual = min(self.bucket_bytes, max(bucket.nbytes for bucket in self.buckets))
        if nbytes > usual and self.device.type != "cpu":  # a vocabulary's matrix, which comes last: only one beside it
            self._buffers = [buffer for buffer, taken in zip(self._buffers, busy, strict=True) if taken]
        buffer = Buffer(self.transport.allocate(max(nbytes, usual)))
        if nbytes <= usual:  # a larger one is let go of after use
            self._buffers.append(buffer)
        return buffer


@dataclass(frozen=True)
class _Sent:
    buffer: Buffer | None
    flight: Flight


def export_hf(chunks: Sequence[ModelChunk], source_dir: str | Path, out_dir: str | Path, *, write: bool) -> None:
    """Write a Hugging Face directory that transformers and vLLM load: weights of `chunks`, the rest from `source_dir`.

    Collective; only the rank with `write` touches the disk. Bit-equal to the model's parameters. Of a model with
    adapters these are merged into its weights, and `ADAPTER_FOLDER` in it has them as they are, for `peft`.
    """
    writer = HfDirectoryWriter(Path(out_dir), Path(source_dir), MAX_FILE_BYTES) if write else None
    for name, tensor in Resharder(chunks, in_order=True).stream():
        if writer:
            writer.add(name, tensor)
    if writer:
        writer.finish()
    spec, lora = chunks[0].spec, chunks[0].lora
    if lora.on:
        table = list(adapter_entries(spec, lora))
        stream = Resharder(chunks, in_order=True, table=table).stream()
        tensors = {name: tensor.cpu().clone() for name, tensor in stream if write}
        if write:
            write_peft(Path(out_dir) / ADAPTER_FOLDER, spec, lora, str(source_dir), tensors)
