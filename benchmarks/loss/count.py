"""What a chunk of the loss asks of a device, counted without one: kernels, waits, collectives, passes and bytes.

The real program runs on tensors that have a shape and no numbers (`meta`), as a rank of a group that is not there, with
one chunk and with two: the difference is a chunk. Every operation that PyTorch dispatches is seen. What the host would
have to wait for has no answer on such tensors and stops the count; what it would have to send is counted as a wait.

Counted as a pass: a kernel that goes through a matrix of a model's logits, be it in their place or in scratch memory,
and is not one of the products. Its bytes: what it reads and what it writes of them. Gathers are no passes. A kernel of
our own (objective.kernels=triton) is an operator whose arguments say what it reads and writes; the tests hold that
against the addresses that an interpreter is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import answer
from prune_opd.config import GateConfig, ObjectiveConfig
from prune_opd.loss import Head, Method, Tokens, distill_loss

NO_KERNEL = {
    *(
        "view",
        "_unsafe_view",
        "as_strided",
        "alias",
        "detach",
        "expand",
        "select",
        "slice",
        "split",
        "split_with_sizes",
    ),
    *("squeeze", "unsqueeze", "t", "transpose", "permute", "unbind", "unfold", "diagonal", "lift_fresh"),
    *("empty", "new_empty", "empty_like"),  # memory alone
}
PRODUCTS = {"mm", "addmm", "addmm_"}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "is_nonzero", "equal", "_unique2"}
SPARSE = {"gather", "scatter_", "scatter_add_", "scatter_reduce_", "index"}


@dataclass
class Counts:
    """Of a chunk. passes: through the student's logits, the teacher's. gbytes: that all passes move."""

    kernels: float = 0
    waits: float = 0
    collectives: float = 0
    passes: tuple[float, float] = (0, 0)
    gbytes: float = 0
    by_kernel: Counter[str] = field(default_factory=Counter)

    def less(self, other: Counts) -> Counts:
        student, teacher = (one - two for one, two in zip(self.passes, other.passes, strict=True))
        return Counts(
            self.kernels - other.kernels,
            self.waits - other.waits,
            self.collectives - other.collectives,
            (student, teacher),
            self.gbytes - other.gbytes,
            self.by_kernel - other.by_kernel,
        )


class Count(TorchDispatchMode):
    """Counts what is dispatched. rows, width: of a model's logits in a chunk."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.counts, self._logits = Counts(), rows * width

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        namespace, name = func.name().split("::")
        name, counts = name.split(".")[0], self.counts
        if namespace == "c10d":
            counts.collectives += 1
            return result
        counts.waits += name in WAITS
        if name in NO_KERNEL:
            return result
        counts.kernels += 1
        counts.by_kernel[name] += 1
        if name not in PRODUCTS and name not in SPARSE:
            self._add_pass(func, args, kwargs, result)
        return result

    def _add_pass(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        read, written = [], []
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            tensors = [leaf for leaf in tree_leaves(given.get(argument.name)) if isinstance(leaf, Tensor)]
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += tensors
            if not argument.is_out:
                read += tensors
        if not written:
            written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        touched = [0.0, 0.0]
        for tensor in (*read, *written):
            share = min(tensor.numel() / self._logits, 2)
            if share < 1 / 9:  # less than the eighth that an objective on the vocabulary works on: a few columns
                continue
            self.counts.gbytes += tensor.numel() * tensor.element_size() / 1e9
            if share > 1.01:
                touched = [max(of, share / 2) for of in touched]
            else:
                of_teacher = tensor.storage_offset() >= self._logits
                touched[of_teacher] = max(touched[of_teacher], share)
        student, teacher = self.counts.passes
        self.counts.passes = (student + touched[0], teacher + touched[1])


def count(
    objective: dict[str, Any], ranks: int, vocab: int, sizes: Sequence[int], chunk: int, gate: bool = True
) -> dict[str, Any]:
    """Counts of one chunk of `chunk` tokens on one of `ranks` ranks, in fp32. sizes: hidden, of student and teacher."""
    if ranks > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=ranks)
    group, rows = dist.group.WORLD if ranks > 1 else None, vocab // ranks
    device = torch.device("meta")

    def run(chunks: int) -> Counts:
        tokens = chunks * chunk
        heads = [
            Head(torch.empty(tokens, size, device=device), torch.empty(rows, size, device=device)) for size in sizes
        ]
        student = Head(*(part.requires_grad_() for part in heads[0]))
        given = Tokens(torch.empty(tokens, dtype=torch.int64, device=device), [0, tokens // 2, tokens], vocab)
        method = Method(GateConfig() if gate else None, ObjectiveConfig(**objective))
        buffer = torch.empty(rows, sizes[0], device=device)
        # One wait for the whole call, not for a chunk: whether the numbers were finite.
        with patch("prune_opd.loss.stats.raise_if_broken"), Count(chunk, -(-rows // 64) * 64) as mode:
            distill_loss(student, heads[1], given, method, tp_group=group, chunk=chunk, weight_grad=buffer)
        return mode.counts

    try:
        return {**vars(run(3).less(run(2)))}
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def count_all(requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`count` of each request, in one process."""
    return [count(**request) for request in requests]


if __name__ == "__main__":
    answer(count_all)
