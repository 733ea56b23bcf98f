"""The rows that a job's teacher has on disk: each read by one rank, known to all, and written by one.

A row is read by the first rank that trains on it; others get it on the way that all of a teacher's rows take
(`redistribute`). What goes wrong with a file is said, and the run goes on: the row is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from prune_opd.elsewhere.row_store import DamagedRowError, RowStore, Shape, row_key
from prune_opd.megatron.layout import Layout
from prune_opd.megatron.redistribute import KeptHidden, replica_of_row
from prune_opd.rollout.balance import Deal
from prune_opd.rollout.batch import Rollouts

HEADER = 1024  # bytes of a row's file beside its numbers, at most


class RowCache:
    """A store, as all ranks of a job use it.

    name: of a row's tensor [T, …]. nothing: that of no token, with dtype, device and shape of a token's numbers.
    """

    def __init__(self, store: RowStore, layout: Layout, name: str, nothing: Tensor) -> None:
        self.store, self.layout, self.name, self.nothing = store, layout, name, nothing
        self.token_bytes = nothing.shape[1] * nothing.element_size()
        self._problems: list[str] = []  # of this rank; said with the next step

    def find(self, rollouts: Rollouts, deals: Sequence[Deal], kept: KeptHidden) -> tuple[KeptHidden, list[str]]:
        """The rows on disk, each with the rank that has read it, and what went wrong on any rank. Collective."""
        of_row = dict[int, Tensor]()
        for row in asked_of(self.layout, deals):
            if row in kept.holders_of:
                continue
            shape = Shape(self.nothing.dtype, (rollouts.length_B[row], *self.nothing.shape[1:]))
            try:
                found = self.store.read(self._key(rollouts, row), {self.name: shape})
            except DamagedRowError as problem:
                self._problems.append(f"{problem}: row {row} is not taken from it")
                continue
            if found is not None:
                of_row[row] = found[self.name].to(self.nothing.device)
        everyone: list[Any] = [None] * self.layout.world
        dist.all_gather_object(everyone, (list(of_row), self._problems))
        self._problems = []
        holders: dict[int, tuple[int, ...]] = {row: (rank,) for rank, (rows, _) in enumerate(everyone) for row in rows}
        return KeptHidden(holders, of_row), [problem for _, of_rank in everyone for problem in of_rank]

    def make_room(self, rollouts: Rollouts, missing: Sequence[int], note: Callable[[str], None]) -> bool:
        """Whether the missing rows may be written. Rank 0 throws out old ones before any rank has a new one."""
        needed = sum(rollouts.length_B[row] * self.token_bytes + HEADER for row in missing)
        if needed > self.store.max_bytes:
            note(
                f"teacher cache: {len(missing)} rows of {needed / 1e9:.3g} GB are not kept: "
                f"teacher_cache.max_gb = {self.store.max_bytes / 1e9:g} holds no whole step"
            )
            return False
        if missing and self.layout.is_main:
            with self._noting(f"rank 0 cannot throw out old rows of {self.store.folder}"):
                self.store.make_room(needed)
        return True

    def write(self, rollouts: Rollouts, known: KeptHidden, missing: Sequence[int]) -> int:
        """Keep the rows that this rank is the first holder of. Bytes of the missing rows' numbers, of all ranks."""
        with self._noting(f"rank {self.layout.rank} cannot write to {self.store.folder}"):
            for row in missing:
                if known.holders_of[row][0] == self.layout.rank:
                    self.store.write(self._key(rollouts, row), {self.name: known.of_row[row]})
        return self.bytes_of(rollouts, missing)

    def bytes_of(self, rollouts: Rollouts, rows: Sequence[int]) -> int:
        lengths = rollouts.length_B
        return self.token_bytes * sum(lengths[row] for row in rows)

    def absent(self, rollouts: Rollouts, missing: Sequence[int], problems: Sequence[str]) -> str:
        """What to say where these rows would have to be there."""
        prompt, path = rollouts.prompts[missing[0]], self.store.path(self._key(rollouts, missing[0]))
        why = f"; {problems[0]}" if problems else ""
        return (
            f"teacher_cache.mode = only: {len(missing)} of {len(rollouts.responses)} rows are not in "
            f"teacher_cache.dir = {str(self.store.folder)!r}, the first is row {missing[0]} (prompt {prompt.index} of "
            f"{prompt.source}), {path}{why}: run once with teacher_cache.mode=use and the same student, teacher, "
            "precision.params, data and seed"
        )

    def _key(self, rollouts: Rollouts, row: int) -> str:
        return row_key(rollouts.teacher_prompt_ids[row], rollouts.responses[row].ids)

    @contextmanager
    def _noting(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as reason:
            self._problems.append(f"{what} ({reason})")


def asked_of(layout: Layout, deals: Sequence[Deal]) -> list[int]:
    """The rows that this rank brings to the others: it is the first rank of the last stage that trains on them."""
    student = layout.student
    return [
        row for row, replica in replica_of_row(deals).items() if student.last_stage_ranks(replica)[0] == layout.rank
    ]
