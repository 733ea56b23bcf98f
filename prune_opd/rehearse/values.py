"""What the host is told when it asks a tensor without data for its numbers.

Numbers that came from the host are known: bounds of packed rows, counts, zeros. They are carried through operations on
small tensors. Of all others nothing is known: then a norm, a loss or a scale is 1, a count 0 and a condition False,
but for those who ask whether all is well (`ANSWERS`).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

KNOWN_NUMBERS = 1 << 14  # of a storage, at most
WHOLE = {"fill_", "zero_", "copy_"}  # in-place operations after which a tensor is known, whatever it was
OPEN = ("empty", "new_empty", "rand", "normal", "bernoulli")  # operations whose results are any numbers

# By the name of the function that asks: what it is told, one number for all or each number.
ANSWERS: dict[str, float | tuple[float, ...]] = {
    "_update": (1.0, 1.0, 0.0),  # the loss, the tokens, and how many ranks have numbers that are not finite
    "compare": 1 << 40,  # the first tensor whose checksum is wrong: none
    "raise_if_broken": 0,
    "reduce": 0,  # the step's statistics: there are no tokens
}


def usual(like: Tensor) -> Tensor:
    """What a tensor of which nothing is known is taken for, on the host."""
    shape, dtype = like.shape, like.dtype
    if like.numel() > KNOWN_NUMBERS:
        return torch.empty(shape, dtype=dtype)  # nobody looks at each of so many, and no memory is taken
    return torch.ones(shape, dtype=dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


class KnownValues:
    """Host copies of the small device storages whose numbers are known."""

    def __init__(self) -> None:
        self._of: dict[int, Tensor] = {}  # by storage: its numbers, end to end
        self._references: dict[int, Any] = {}

    def of(self, tensor: Tensor) -> Tensor | None:
        """A view of what is known of a device tensor; writing to it changes what is known."""
        if not self._of:
            return None
        flat = self._of.get(tensor.untyped_storage()._cdata)
        if flat is None or flat.dtype != tensor.dtype:
            return None
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def concern(self, tensors: Sequence[Tensor]) -> bool:
        """Whether what is known may change, or more become known, by an operation on these device tensors."""
        if tensors[0].numel() > KNOWN_NUMBERS:
            return bool(self._of) and tensors[0].untyped_storage()._cdata in self._of
        return all(x.numel() <= KNOWN_NUMBERS for x in tensors)

    def learn(self, tensor: Tensor, numbers: Tensor) -> None:
        """The numbers of a device tensor that has a storage to itself."""
        storage = tensor.untyped_storage()
        size = storage.nbytes() // tensor.element_size()
        if size > KNOWN_NUMBERS or tensor.numel() != size or numbers.shape != tensor.shape:
            return
        flat = torch.empty(size, dtype=tensor.dtype)
        flat.as_strided(tensor.shape, tensor.stride()).copy_(numbers)
        key = storage._cdata
        self._of[key] = flat
        self._references[key] = weakref.ref(storage, lambda _: self._forget(key))

    def _forget(self, key: int) -> None:
        self._of.pop(key, None)
        self._references.pop(key, None)

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Carry what is known through an operation that has happened on device tensors."""
        name = func._schema.name.partition("::")[2]
        if name == "set_":  # a tensor that is made a view of a storage: nothing is written
            return
        in_place = func._schema.is_mutable
        if in_place and name in WHOLE and self.of(args[0]) is None and isinstance(args[0], Tensor):
            self.learn(args[0], usual(args[0]))
        unknown = False

        def on_host(x: Any) -> Any:
            nonlocal unknown
            if not isinstance(x, Tensor) or x.device.type != "meta":
                return torch.device("cpu") if isinstance(x, torch.device) else x
            known = self.of(x) if x.numel() <= KNOWN_NUMBERS else None
            unknown = unknown or known is None
            return known

        host_args, host_kwargs = tree_map(on_host, (args, kwargs))
        if in_place:
            target = self.of(args[0]) if isinstance(args[0], Tensor) else None
            if target is None:
                return
            if unknown and target.numel() == self._of[args[0].untyped_storage()._cdata].numel():
                self._forget(args[0].untyped_storage()._cdata)
            elif unknown:  # a part of it
                target.copy_(usual(args[0]))
            else:
                func(*host_args, **host_kwargs)
        elif isinstance(result, Tensor) and result.numel() <= KNOWN_NUMBERS and not (unknown or name.startswith(OPEN)):
            self.learn(result, func(*host_args, **host_kwargs))

    def told(self, tensor: Tensor, asker: str) -> Tensor:
        """What the host gets when it reads a device tensor."""
        answer = ANSWERS.get(asker)
        if isinstance(answer, tuple):
            return torch.tensor(answer, dtype=tensor.dtype).view(tensor.shape)
        if answer is not None:
            return torch.full(tensor.shape, answer, dtype=tensor.dtype)
        known = self.of(tensor)
        return usual(tensor) if known is None else known.clone()
