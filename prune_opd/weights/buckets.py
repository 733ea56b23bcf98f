"""Which rank sends which shard, and which tensors share a bucket: worked out once, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, groupby, zip_longest
from math import prod

import torch
from torch import Tensor

from prune_opd.weights.cut import VOCABULARY, Cut, Shape
from prune_opd.weights.mapping import Entry

ALIGNMENT = 256  # bytes: every tensor begins where any dtype and any copy kernel may begin


@dataclass(frozen=True)
class Holding:
    """A shard that a rank has: number `index` of `count`. merged: it is made when it is sent (adapters.py)."""

    index: int
    count: int
    dtype: torch.dtype
    merged: bool = False


@dataclass(frozen=True)
class Item:
    """One megatron parameter on its way: the whole Hugging Face tensors it becomes, and who sends each shard.

    owners: of each shard, the rank (in the group) that sends it. everywhere: every rank has it whole. merged: as
    `Holding` has it. at_home: everywhere, and as it is asked for, so nothing is sent or copied. offsets: bytes from the
    start of the bucket, none if at_home. wires: where each shard travels, in bytes, if it does not arrive in its place;
    else none.
    """

    entry: Entry
    dtype: torch.dtype
    owners: tuple[int, ...]
    everywhere: bool
    merged: bool = False
    offsets: tuple[int, ...] = ()
    wires: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return len(self.owners)

    @property
    def at_home(self) -> bool:
        return self.everywhere and not self.entry.cut.groups and not self.merged

    def wholes(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """The whole tensors as views of the bucket's buffer [bytes]."""
        tensors = zip(self.offsets, self.entry.shapes, strict=True)
        return tuple(view(buffer, offset, shape, self.dtype) for offset, shape in tensors)

    def wire(self, buffer: Tensor, index: int) -> tuple[Tensor, ...]:
        """Shard `index` as it travels: contiguous views of the bucket's buffer, in the shapes of `slices`."""
        tensors = zip(_starts(self.wires[index], self.wire_sizes(index)), self._slice_shapes(index), strict=True)
        return tuple(view(buffer, offset, shape, self.dtype) for offset, shape in tensors)

    def wire_sizes(self, index: int) -> list[int]:
        """Bytes that the parts of shard `index` take there."""
        return [_aligned(shape, self.dtype) for shape in self._slice_shapes(index)]

    def _slice_shapes(self, index: int) -> tuple[Shape, ...]:
        return _slice_shapes(self.entry.cut, self.entry.shapes, index, self.count)

    def parts(self, shard: Tensor, index: int) -> tuple[Tensor, ...]:
        """Views of shard `index`: what it has of each whole tensor."""
        return self.entry.cut.parts(shard, self.entry.shapes, index, self.count)

    def slices(self, wholes: Sequence[Tensor], index: int) -> tuple[Tensor, ...]:
        """Views of the whole tensors, where those parts belong."""
        return self.entry.cut.slices(wholes, index, self.count)


@dataclass(frozen=True)
class Bucket:
    """Items that travel together. at_home items take no room; nbytes is what the others take.

    segments: by the rank (in the group) that sends it, the bytes of the buffer that go out in one piece.
    """

    items: tuple[Item, ...]
    nbytes: int
    segments: Mapping[int, tuple[int, int]]


def view(buffer: Tensor, offset: int, shape: Shape, dtype: torch.dtype) -> Tensor:
    return buffer[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(*shape)


def make_items(entries: Iterable[Entry], holdings: Sequence[Mapping[str, Holding]]) -> Iterator[Item]:
    """holdings: of every rank of the group, by megatron name. Of several ranks that have a shard the least busy sends.

    Raises `ValueError` for a shard that no rank of the group has.
    """
    sends = [0] * len(holdings)
    for entry in entries:
        holders: dict[int, list[int]] = {}
        for rank, held in enumerate(holdings):
            if entry.megatron in held:
                holders.setdefault(held[entry.megatron].index, []).append(rank)
        one = next((held[entry.megatron] for held in holdings if entry.megatron in held), None)
        if one is None or sorted(holders) != list(range(one.count)):
            raise ValueError(f"no rank of the group has all of {entry.megatron}")
        owners, numbers = [], prod(entry.cut.shape(entry.shapes, one.count))
        for index in range(one.count):
            owner = min(holders[index], key=lambda rank: sends[rank])
            sends[owner] += numbers
            owners.append(owner)
        everywhere = one.count == 1 and len(holders[0]) == len(holdings)
        yield Item(entry, one.dtype, tuple(owners), everywhere, one.merged)


def make_buckets(items: Iterable[Item], bucket_bytes: int, *, staging: bool, in_order: bool = False) -> list[Bucket]:
    """Buckets of at most `bucket_bytes`; a larger parameter has a bucket for itself.

    A layer that fits into a bucket is not cut: vLLM keeps what it was given of a module until it has all of it. Layers
    of different pipeline stages take turns, so that all stages send at the same time. The vocabulary's matrices come
    last: vLLM keeps one that it pads until the end of a load. in_order: the order of the items instead. staging: what a
    rank sends of a bucket lies together, in one segment. A tensor that one rank sends arrives in its place. One whose
    shards several ranks send gets room for them beside its own.
    """
    buckets: list[list[Item]] = [[]]
    used = 0
    layers = [list(layer) for _, layer in groupby(items, key=lambda item: _layer(item.entry.megatron))]
    for layer in layers if in_order else _in_turn(layers):
        fits = sum(_room(item, staging) for item in layer) <= bucket_bytes
        for unit in [layer] if fits else [[item] for item in layer]:
            room = sum(_room(item, staging) for item in unit)
            if buckets[-1] and used + room > bucket_bytes:
                buckets.append([])
                used = 0
            buckets[-1] += unit
            used += room
    return [_pack(bucket, staging) for bucket in buckets if bucket]


def _in_turn(layers: Sequence[list[Item]]) -> Iterator[list[Item]]:
    """The first layer of each sender, the second of each, …; then the vocabulary."""
    of_sender: dict[int, list[list[Item]]] = {}
    vocabulary = [layer for layer in layers if layer[0].entry.cut == VOCABULARY]
    for layer in layers:
        if layer[0].entry.cut != VOCABULARY:
            # Every rank of a stage sends some of it: the least of them stands for the stage.
            of_sender.setdefault(min(min(item.owners) for item in layer), []).append(layer)
    for turn in zip_longest(*of_sender.values()):
        yield from (layer for layer in turn if layer is not None)
    yield from vocabulary


def _layer(megatron: str) -> str:
    parts = megatron.split(".")
    return ".".join(parts[:3]) if parts[:2] == ["decoder", "layers"] else megatron


def _aligned(shape: Shape, dtype: torch.dtype) -> int:
    return -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


@cache
def _slice_shapes(cut: Cut, shapes: tuple[Shape, ...], index: int, count: int) -> tuple[Shape, ...]:
    wholes = [torch.empty(shape, device="meta") for shape in shapes]
    return tuple(tuple(piece.shape) for piece in cut.slices(wholes, index, count))


def _staged(item: Item, staging: bool) -> bool:
    return staging and item.count > 1


def _room(item: Item, staging: bool) -> int:
    if item.at_home:
        return 0
    room = sum(_aligned(shape, item.dtype) for shape in item.entry.shapes)
    return room + (sum(sum(item.wire_sizes(i)) for i in range(item.count)) if _staged(item, staging) else 0)


def _pack(items: Sequence[Item], staging: bool) -> Bucket:
    """Give every tensor its place: first what arrives in its place, by sender, with the sender's shards behind it."""
    offsets: dict[int, tuple[int, ...]] = {}
    wires: dict[int, dict[int, int]] = {}
    segments: dict[int, tuple[int, int]] = {}
    end = 0
    for sender in sorted({owner for item in items for owner in item.owners}) if staging else ():
        begin = end
        for number, item in enumerate(items):
            if item.everywhere:
                continue
            for index, owner in enumerate(item.owners):
                if owner != sender:
                    continue
                if item.count == 1:
                    offsets[number], end = _places(item, end)
                else:
                    wires.setdefault(number, {})[index] = end
                    end += sum(item.wire_sizes(index))
        if end > begin:
            segments[sender] = begin, end
    packed = []
    for number, item in enumerate(items):
        if number not in offsets:
            offsets[number], end = _places(item, end)
        of_shards = wires.get(number, {})
        packed.append(
            replace(item, offsets=offsets[number], wires=tuple(of_shards[index] for index in sorted(of_shards)))
        )
    return Bucket(tuple(packed), end, segments)


def _places(item: Item, begin: int) -> tuple[tuple[int, ...], int]:
    """Where an item's whole tensors begin, and where they end."""
    sizes = [] if item.at_home else [_aligned(shape, item.dtype) for shape in item.entry.shapes]
    return tuple(_starts(begin, sizes)), begin + sum(sizes)


def _starts(begin: int, sizes: Sequence[int]) -> list[int]:
    return list(accumulate(sizes, initial=begin))[:-1]
