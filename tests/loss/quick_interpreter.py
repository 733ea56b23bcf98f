"""Triton's interpreter without most of its bookkeeping: it computes the same, in a fifth of the time."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any


def quicken() -> None:
    """Call it before the first kernel. Where there is no Triton, it does nothing."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    plain_patch, patched = interpreter._patch_lang, set()

    def patch_once(fn: Any) -> Any:
        """It takes most of its time for putting its functions in the language's places at every call."""
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            plain_patch(fn)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_once
    _remember_types()


def _remember_types() -> None:
    """It takes a third of the rest for making the types of intermediate results anew; they are few."""
    from triton.language import core
    from triton.runtime import interpreter

    plain_dtype, plain_block, plain_equal = (
        interpreter._get_np_dtype,
        core.block_type.__init__,
        core.tuple.__eq__,
    )
    dtypes: dict[str, Any] = {}
    blocks: dict[Any, dict[str, Any]] = {}

    def dtype(of: Any) -> Any:
        if of.name not in dtypes:
            dtypes[of.name] = plain_dtype(of)
        return dtypes[of.name]

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *map(int, shape))
        if key not in blocks:
            plain_block(self, element_ty, shape)
            blocks[key] = {name: value for name, value in self.__dict__.items() if name != "element_ty"}
        self.__dict__.update(blocks[key], element_ty=element_ty)

    @functools.cache
    def sizes(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return core.constexpr(math.prod(shape)), core.tuple([core.constexpr(size) for size in shape])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = sizes(type.shape if type.is_block() else ())

    def equal(self: Any, other: Any) -> Any:
        return core.constexpr(True) if self is other else plain_equal(self, other)

    interpreter._get_np_dtype = dtype
    core.block_type.__init__, core.tensor.__init__, core.tuple.__eq__ = block, tensor, equal
