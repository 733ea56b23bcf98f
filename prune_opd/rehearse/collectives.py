"""Collectives without other ranks: nothing moves. What torch's fake group takes of the device is torch's own; the rest
is here, with the sizes that NCCL would refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from prune_opd.rehearse.values import KnownValues

LARGE = 1 << 20  # bytes of a host tensor whose numbers are left alone
c10d = torch.ops.c10d


def perform(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], values: KnownValues, missing: Callable[[Any], None]
) -> Any:
    """The result of a collective.

    One on tensors of the device that torch has no kernel for, and that is not in `_OURS`, is told to `missing`: what it
    does is not known then. Raises `ValueError` for sizes that do not fit.
    """
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    if func is c10d._allgather_base_.default and (known := values.of(args[1])) is not None:
        values.learn(args[0], known.repeat(args[0].numel() // known.numel(), *([1] * (known.dim() - 1))))
    if not any(x.is_meta for x in tensors):
        if any(x.nbytes > LARGE for x in tensors):
            args = _without_tensors(args)
        return func(*args, **kwargs)
    if (check := _OURS.get(func)) is not None:
        check(*args)
        return func(*_without_tensors(args), **kwargs)  # a work to wait for
    try:
        return func(*args, **kwargs)
    except NotImplementedError:
        missing(func)
        return func(*_without_tensors(args), **kwargs)


def _without_tensors(args: tuple[Any, ...]) -> tuple[Any, ...]:
    found: tuple[Any, ...] = tree_map(lambda x: torch.empty(0) if isinstance(x, Tensor) else x, args)
    return found


def _gathered(whole: list[Tensor], parts: list[Tensor], group: Any, *_: Any) -> None:
    size = torch.distributed.ProcessGroup.unbox(group).size()
    for one, part in zip(whole, parts, strict=True):
        if one.numel() != size * part.numel() or one.dtype != part.dtype:
            raise ValueError(
                f"a collective of {size} ranks with {one.numel()} numbers of {one.dtype} for all of them and "
                f"{part.numel()} of {part.dtype} for each"
            )


def _scattered(parts: list[Tensor], whole: list[Tensor], group: Any, *_: Any) -> None:
    _gathered(whole, parts, group)


_OURS = {
    c10d.allgather_into_tensor_coalesced_.default: _gathered,
    c10d.reduce_scatter_tensor_coalesced_.default: _scattered,
}
