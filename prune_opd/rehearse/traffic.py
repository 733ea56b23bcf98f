"""Collectives of a rehearsal: which group, how often and how many bytes, by phase."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, zip_longest
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


MESSAGES = {"send", "receive"}  # between two ranks of a group
ALIKE = {"all-reduce", "reduce-scatter"}  # of which all ranks of a group give the same number of bytes


@dataclass
class Sum:
    count: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class Call:
    """One collective. nbytes: 0 where ranks may give different ones."""

    phase: str
    operation: str
    nbytes: int

    def __str__(self) -> str:
        return f"{self.operation} of {self.nbytes} bytes" if self.nbytes else self.operation


class Traffic:
    """by[phase, group, operation]. Bytes: of the largest list of tensors that a rank gives or gets.

    order: the collectives of each group, by its ranks. messages: by group, source and destination; of a rank that is
    the source those that it sends, of one that is the destination those that it waits for.
    """

    def __init__(self) -> None:
        self.by: defaultdict[tuple[str, str, str], Sum] = defaultdict(Sum)
        self.names: dict[str, str] = {}  # of the groups
        self.order: defaultdict[tuple[int, ...], list[Call]] = defaultdict(list)
        self.messages: defaultdict[tuple[tuple[int, ...], int, int], list[Call]] = defaultdict(list)

    def record(self, phase: str, func: Any, args: tuple[Any, ...]) -> None:
        raw = func._schema.name.partition("::")[2]
        operation = NAMES.get(raw, raw)
        group = next(dist.ProcessGroup.unbox(x) for x in args if _is_group(x))
        nbytes = max(sum(t.nbytes for t in tree_flatten(x)[0] if isinstance(t, Tensor)) for x in args)
        total = self.by[phase, self.names.get(group.group_name, f"{group.size()} ranks"), operation]
        total.count += 1
        total.nbytes += nbytes
        ranks = tuple(dist.get_process_group_ranks(group))
        if operation in MESSAGES:
            other = ranks[next(x for x in args if isinstance(x, int))]
            ends = (dist.get_rank(), other) if operation == "send" else (other, dist.get_rank())
            self.messages[ranks, *ends].append(Call(phase, operation, nbytes))
            return
        self.order[ranks].append(Call(phase, operation, nbytes if operation in ALIKE else 0))

    def note(self, phase: str, operation: str) -> None:
        """A collective of objects over the whole job that was not made."""
        self.by[phase, f"all ({dist.get_world_size()})", operation].count += 1
        self.order[tuple(range(dist.get_world_size()))].append(Call(phase, operation, 0))


def disagreements(ranks: Sequence[tuple[int, Traffic]]) -> Iterator[str]:
    """Where two ranks of a group would not meet: one of them would wait for ever."""
    for (one, mine), (other, theirs) in combinations(ranks, 2):
        for group in mine.order.keys() & theirs.order.keys():
            pairs = zip_longest(mine.order[group], theirs.order[group])
            for number, (a, b) in enumerate(pairs):
                if a is None or b is None or (a.operation, a.nbytes) != (b.operation, b.nbytes):
                    phase = (a or b).phase
                    yield (
                        f"collectives: number {number} of the group of {len(group)} ranks is {a or 'none'} on rank "
                        f"{one} and {b or 'none'} on rank {other} ({phase})"
                    )
                    break
        yield from _unmet(one, mine, other, theirs)


def _unmet(one: int, mine: Traffic, other: int, theirs: Traffic) -> Iterator[str]:
    """Messages between two ranks that one of them sends and the other does not wait for."""
    keys = {key for traffic in (mine, theirs) for key in traffic.messages if {*key[1:]} == {one, other}}
    for group, source, destination in sorted(keys):
        ends = (mine, theirs) if source == one else (theirs, mine)
        sent, awaited = (traffic.messages.get((group, source, destination), []) for traffic in ends)
        for number, (a, b) in enumerate(zip_longest(sent, awaited)):
            if a is None or b is None or a.nbytes != b.nbytes:
                yield (
                    f"messages: number {number} from rank {source} to rank {destination} is {a or 'none'} on the one "
                    f"and {b or 'none'} on the other ({(a or b).phase})"
                )
                break


def _is_group(x: Any) -> bool:
    if type(x).__name__ != "ScriptObject":
        return False
    try:
        dist.ProcessGroup.unbox(x)
    except RuntimeError:  # a reduction's operator
        return False
    return True
