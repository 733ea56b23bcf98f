"""Every operation of a rehearsal goes through here: what it allocates, what the host reads, what is misplaced.

Tensors of the device are on `meta`: they have shapes and storages of a size, and no data. An operation on them costs
nothing but the question what its result looks like, and that is asked once for each kind of operation and shapes.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from prune_opd.rehearse.collectives import LARGE, perform
from prune_opd.rehearse.ledger import Ledger
from prune_opd.rehearse.traffic import Traffic
from prune_opd.rehearse.values import KNOWN_NUMBERS, KnownValues

aten = torch.ops.aten
META = torch.device("meta")
PACKAGE = str(Path(__file__).resolve().parents[1])
OURS = str(Path(__file__).resolve().parent)
ADDING = {"add_", "addmm_", "copy_", "add", "addmm", "mm"}  # how a gradient comes into a buffer
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default, aten.index_put.default}


@dataclass(frozen=True)
class Place:
    """A line of the product, or of megatron-core or torch where the product is not on the stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.function})"


def asking() -> Place:
    """Who has called: the innermost frame of this package or of megatron-core that is not of the rehearsal."""
    frame: FrameType | None = sys._getframe(1)
    fallback = None
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(OURS):
            inside = file.startswith(PACKAGE)
            if inside or "/megatron/" in file:
                root = "prune_opd/" if inside else "megatron/"
                return Place(root + file.rpartition(f"/{root}")[2], frame.f_lineno, frame.f_code.co_name)
            if fallback is None and "/torch/" not in file:
                fallback = Place(Path(file).name, frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back
    return fallback or Place("?", 0, "?")


@dataclass
class Findings:
    """What a GPU would stall on, or refuse; what was not gone through. By phase, kind of operation and place."""

    reads: Counter[tuple[str, str, Place]] = field(default_factory=Counter)
    wrong_device: Counter[tuple[str, str, Place]] = field(default_factory=Counter)
    missing: Counter[tuple[str, str, Place]] = field(default_factory=Counter)  # torch has no kernel without data
    to_host: Counter[str] = field(default_factory=Counter)  # bytes by phase, that nobody waits for
    to_device: Counter[str] = field(default_factory=Counter)


class Watch(TorchDispatchMode):
    """While it is entered: counts live bytes, collectives and host reads, and answers for the missing numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger, self.traffic, self.values, self.found = Ledger(), Traffic(), KnownValues(), Findings()
        self.routing: dict[int, int] = {}  # experts → how many of them a token goes to
        self.operations = 0
        self.written: dict[int, set[int]] = {}  # of storages that are asked about: where something was added
        self._shapes: dict[Any, Any] = {}  # of results, by operation and arguments
        self._kinds: dict[Any, str] = {}

    @property
    def phase(self) -> str:
        return self.ledger.phase

    def enter(self, phase: str) -> None:
        self.ledger.enter(phase)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operations += 1
        if func.namespace == "c10d":
            self.traffic.record(self.phase, func, args)
            return perform(func, args, kwargs, self.values, self.note_missing)
        if (told := _HANDLERS.get(func)) is not None:
            result = told(self, func, args, kwargs)
            if result is not NotImplemented:
                return result
        tensors = _tensors(args, kwargs)
        on_device = [x for x in tensors if x.is_meta]
        if on_device and len(on_device) < len(tensors):
            args, kwargs = self._on_one_device(func, args, kwargs)
        elif not on_device and kwargs.get("device") != META:
            return _on_host(func, args, kwargs)
        result = self._run(func, args, kwargs)
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor) and x.is_meta:
                self.ledger.see(x)
        if not on_device or self.values.concern(on_device):
            self.values.follow(func, args, kwargs, result)
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operation on device tensors."""
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind(func)
        if kind in ("in place", "out"):
            written = args[0] if kind == "in place" else kwargs["out"]
            if self.written and _name(func) in ADDING:
                offsets = self.written.get(written.untyped_storage()._cdata)
                if offsets is not None:
                    offsets.add(written.storage_offset())
            return written
        if kind == "fresh" and (key := _key(func, args, kwargs)) is not None:
            shape = self._shapes.get(key)
            if shape is None:
                result = func(*args, **kwargs)
                self._shapes[key] = _shape_of(result)
                return result
            return _of_shape(shape)
        return func(*args, **kwargs)  # a view, or something rare

    def _on_one_device(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """CUDA takes single numbers from the host, and indices, and nothing else."""

        def wrong(x: Any) -> bool:
            return isinstance(x, Tensor) and x.device.type == "cpu" and x.dim() > 0

        of_concern = args[:1] if func in INDEXING else args
        if func not in COPIES and any(wrong(x) for x in tree_flatten((of_concern, kwargs))[0]):
            self.found.wrong_device[self.phase, _name(func), asking()] += 1

        def move(x: Any) -> Any:
            return _without_data(x) if isinstance(x, Tensor) and x.device.type == "cpu" else x

        return tree_map(move, (args, kwargs))

    # ------------------------------------------------------------------------------------ the host and the device

    def note_missing(self, func: Any) -> None:
        """An operation of which a rehearsal does not know what it does."""
        self.found.missing[self.phase, _name(func), asking()] += 1

    def read(self, tensor: Tensor, how: str) -> Tensor:
        """The host waits for the device and reads: what it gets."""
        place = asking()
        self.found.reads[self.phase, how, place] += 1
        return self.values.told(tensor, place.function)


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    found = []
    for x in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, list | tuple):
            found += [y for y in x if isinstance(y, Tensor)]
    return found


def _kind(func: Any) -> str:
    """What an operation does to its arguments, by its schema."""
    schema = func._schema
    if not schema.is_mutable:
        return "view" if any(r.alias_info is not None for r in schema.returns) else "fresh"
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if written == ["out"] and len(schema.returns) == 1:
        return "out"
    alone = written == [schema.arguments[0].name] and len(schema.returns) == 1
    return "in place" if alone and schema.name != "aten::set_" else "other"


def _on_host(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation of the host: done, but for large ones, whose numbers nobody needs and whose memory is not here."""
    name = func._schema.name.partition("::")[2]
    if name in ("zeros", "ones", "full") and prod(args[0]) > LARGE:
        return torch.empty(args[0], dtype=kwargs.get("dtype"))
    if args and isinstance(args[0], Tensor) and args[0].nbytes > LARGE and _kind(func) == "in place":
        return args[0]
    if name == "cat" and sum(x.nbytes for x in args[0]) > LARGE:
        sizes = torch.cat([x.to(META) for x in args[0]], *args[1:], **kwargs).shape
        return torch.empty(sizes, dtype=args[0][0].dtype)
    return func(*args, **kwargs)


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _name(func: Any) -> str:
    return func._schema.name.partition("::")[2]


# ------------------------------------------------------------------------------------------ shapes, asked for once


def _key(func: Any, args: Any, kwargs: Any) -> Any:
    try:
        key = (func, _frozen(args), _frozen(kwargs))
        hash(key)
        return key
    except TypeError:
        return None


def _frozen(x: Any) -> Any:
    if isinstance(x, Tensor):
        return (x.shape, x.stride(), x.dtype, x.device.type)
    if isinstance(x, list | tuple):
        return tuple(_frozen(y) for y in x)
    if isinstance(x, dict):
        return tuple((k, _frozen(v)) for k, v in x.items())
    return (type(x), x)


def _shape_of(result: Any) -> Any:
    if isinstance(result, Tensor):
        return (tuple(result.shape), tuple(result.stride()), result.dtype, result.device)
    if isinstance(result, list | tuple):
        return [_shape_of(x) for x in result]
    return ("plain", result)


def _of_shape(shape: Any) -> Any:
    if isinstance(shape, list):
        return tuple(_of_shape(x) for x in shape)
    if shape[0] == "plain":
        return shape[1]
    return torch.empty_strided(shape[0], shape[1], dtype=shape[2], device=shape[3])


# ----------------------------------------------------------------------------------------------- special operations


def _to_copy(watch: Watch, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    source, device = args[0], kwargs.get("device")
    if device is None or device.type == source.device.type:
        return NotImplemented
    if source.device.type == "meta":
        nbytes = source.numel() * (kwargs.get("dtype") or source.dtype).itemsize
        if kwargs.get("non_blocking"):
            watch.found.to_host[watch.phase] += nbytes
            told = watch.values.told(source, asking().function)
        else:
            told = watch.read(source, "copy to the host")
        return told.to(kwargs.get("dtype") or source.dtype)
    result = torch.empty_like(source, dtype=kwargs.get("dtype") or source.dtype, device="meta")
    watch.found.to_device[watch.phase] += result.nbytes
    watch.ledger.see(result)
    watch.values.learn(result, source.to(result.dtype))
    return result


def _copy(watch: Watch, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    to, source = args[0], args[1]
    if to.device.type == source.device.type:
        return NotImplemented
    if source.device.type == "meta":
        if kwargs.get("non_blocking") or (len(args) > 2 and args[2]):
            watch.found.to_host[watch.phase] += source.nbytes
        elif watch.phase != "build":
            watch.found.reads[watch.phase, "copy to the host", asking()] += 1
        return to
    watch.found.to_device[watch.phase] += source.nbytes
    if (known := watch.values.of(to)) is not None:
        known.copy_(source)
    elif to.numel() <= KNOWN_NUMBERS:
        watch.values.learn(to, source.to(to.dtype).expand(to.shape))
    return to


def _item(watch: Watch, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args[0].device.type != "meta":
        return NotImplemented
    return watch.read(args[0], "item").item()


def _repeat_interleave(watch: Watch, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    repeats = args[0]
    if repeats.device.type != "meta":
        return NotImplemented
    if (size := kwargs.get("output_size")) is None:
        size = int(watch.read(repeats, "repeat_interleave").sum())
    result = torch.empty(size, dtype=repeats.dtype, device="meta")
    watch.ledger.see(result)
    return result


def _index(watch: Watch, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """By a mask: the host waits for how many there are. All are taken to be there, which needs the most memory."""
    tensor, indices = args
    masks = [x for x in indices if x is not None and x.dtype == torch.bool and x.device.type == "meta"]
    if not masks or tensor.device.type != "meta":
        return NotImplemented
    watch.found.reads[watch.phase, "index by a mask", asking()] += 1
    found: list[Tensor | None] = []
    for x in indices:
        mask = x is not None and x.dtype == torch.bool
        found += [torch.empty(x.numel(), dtype=torch.int64, device="meta")] * x.dim() if mask else [x]
    result = func(tensor, found)
    watch.ledger.see(result)
    return result


def _index_put(watch: Watch, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, indices, values = args[:3]
    by_mask = any(x is not None and x.dtype == torch.bool and x.device.type == "meta" for x in indices)
    if by_mask and (values.numel() != 1 or any(args[3:4])):  # one number is filled in without a wait
        watch.found.reads[watch.phase, "write by a mask", asking()] += 1
        return tensor
    return NotImplemented


def _masked_select(watch: Watch, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The dispatcher of experts takes those of its tokens: each goes to as many experts as the model says."""
    tensor, mask = args
    if not mask.is_meta:
        return NotImplemented
    watch.found.reads[watch.phase, "masked_select", asking()] += 1
    routed = mask.dim() == 2 and len(mask) in watch.routing and asking().function == "permute"
    size = mask.shape[1] * watch.routing[len(mask)] if routed else mask.numel()
    result = torch.empty(size, dtype=tensor.dtype, device="meta")
    watch.ledger.see(result)
    return result


def _sum(watch: Watch, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """How many tokens go to each expert: as many to one as to any other."""
    mask = args[0]
    routed = mask.is_meta and mask.dtype == torch.bool and mask.dim() == 2 and list(args[1]) == [0]
    if not routed or mask.shape[1] not in watch.routing or asking().function != "preprocess":
        return NotImplemented
    experts, result = mask.shape[1], torch.empty(mask.shape[1], dtype=torch.int64, device="meta")
    watch.ledger.see(result)
    each, rest = divmod(len(mask) * watch.routing[experts], experts)
    watch.values.learn(result, torch.tensor([each + (i < rest) for i in range(experts)]))
    return result


def _nonzero(watch: Watch, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    condition = args[0]
    if condition.device.type != "meta":
        return NotImplemented
    found = watch.read(condition, "nonzero").nonzero()
    result = torch.empty(found.shape, dtype=torch.int64, device="meta")
    watch.ledger.see(result)
    watch.values.learn(result, found)
    return result


_HANDLERS: dict[Any, Any] = {
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
    aten._local_scalar_dense.default: _item,
    aten.repeat_interleave.Tensor: _repeat_interleave,
    aten.nonzero.default: _nonzero,
    aten.index.Tensor: _index,
    aten.masked_select.default: _masked_select,
    aten.sum.dim_IntList: _sum,
    aten.index_put_.default: _index_put,
}
