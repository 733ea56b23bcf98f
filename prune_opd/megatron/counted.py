"""A model's parameters, each once, wherever ranks hold it and however often."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from prune_opd.errors import UserError
from prune_opd.weights.checksum import INTEGERS


def counted(parameters: Iterable[Tensor], groups: Any) -> Iterator[Tensor]:
    """Those that this rank counts: no replica, no copy of a tied embedding, no duplicate of another TP rank."""
    for parameter in parameters:
        expert = not getattr(parameter, "allreduce", True)  # megatron's mark: other replicas than a dense one has
        replica = (groups.expt_dp if expert else groups.dp_cp).rank() != 0
        whole = expert or param_is_not_tensor_parallel_duplicate(parameter, groups.tp)
        if whole and not replica and param_is_not_shared(parameter):
            yield parameter


@torch.no_grad()
def frozen_sum(chunks: Sequence[Any]) -> int:
    """Sum of the bits of all weights that are not trained, modulo 2**64: the same in every layout. Collective."""
    groups, device = chunks[0].pg_collection, next(chunks[0].parameters()).device
    total = torch.zeros((), dtype=torch.int64, device=device)
    frozen = (parameter for chunk in chunks for parameter in chunk.parameters() if not parameter.requires_grad)
    for parameter in counted(frozen, groups):
        total += parameter.view(INTEGERS[parameter.element_size()]).sum(dtype=torch.int64)
    dist.all_reduce(total)
    return int(total)


def check_frozen(chunks: Sequence[Any], expected: int | None, checkpoint: object, student: str) -> None:
    """`UserError` where a checkpoint's adapters belong to other weights than `chunks` has. None: nothing is known."""
    if expected is not None and frozen_sum(chunks) != expected:
        raise UserError(
            f"{checkpoint} has adapters alone, and the weights that they were trained on are not those of student = "
            f"{student!r} as it is now: put that directory back as it was"
        )
