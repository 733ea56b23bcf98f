"""Collectives of a rehearsal: which group, how often and how many bytes, by phase."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten

NAMES = {
    "allreduce_": "all-reduce",
    "broadcast_": "broadcast",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "alltoall_": "all-to-all",
    "gather_": "gather",
    "scatter_": "scatter",
    "barrier": "barrier",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "allgather_into_tensor_coalesced_": "all-gather",
    "allreduce_coalesced_": "all-reduce",
    "send": "send",
    "recv_": "receive",
}


@dataclass
class Sum:
    count: int = 0
    nbytes: int = 0


class Traffic:
    """by[phase, group, operation]. Bytes: of the largest tensor list that a rank gives or gets."""

    def __init__(self) -> None:
        self.by: defaultdict[tuple[str, str, str], Sum] = defaultdict(Sum)
        self.names: dict[str, str] = {}  # of the groups
        self.order: list[tuple[str, str, str, int]] = []

    def record(self, phase: str, func: Any, args: tuple[Any, ...]) -> None:
        operation = func._schema.name.partition("::")[2]
        group = next(dist.ProcessGroup.unbox(x) for x in args if _is_group(x))
        sizes = [sum(t.nbytes for t in tree_flatten(x)[0] if isinstance(t, Tensor)) for x in args]
        name = self.names.get(group.group_name, f"{group.size()} ranks")
        total = self.by[phase, name, NAMES.get(operation, operation)]
        total.count += 1
        total.nbytes += max(sizes)
        self.order.append((phase, name, operation, max(sizes)))


def _is_group(x: Any) -> bool:
    if type(x).__name__ != "ScriptObject":
        return False
    try:
        dist.ProcessGroup.unbox(x)
    except RuntimeError:  # a reduction's operator
        return False
    return True
