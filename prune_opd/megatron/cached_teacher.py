"""A teacher that keeps what it knows on disk, and computes no row that is there (`megatron/row_cache.py`).

    hidden(rollouts, deals)
      ├─ each row's reader looks for its file ─▶ every rank knows which rows are there, and which files are damaged
      ├─ whole micro-batches of rows that are there are left out of the teacher's pass (`KeptHidden`)
      └─ of each row that was not there, one rank that holds it writes the file

What the in-flight gate and the self-test look at is neither read nor kept: it is of one run only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from prune_opd.elsewhere.row_store import RowStore
from prune_opd.errors import UserError
from prune_opd.megatron.redistribute import KeptHidden, TeacherHidden, replica_of_row
from prune_opd.megatron.row_cache import RowCache
from prune_opd.megatron.teacher import Teacher
from prune_opd.rollout.balance import Deal
from prune_opd.rollout.batch import Rollouts

NAME = "hidden_TH"  # of a row's tensor


class CachedTeacher(Teacher):
    """A `Teacher` with a store of rows, `keep_in`. Without layers every row must be in it."""

    def keep_in(self, store: RowStore) -> None:
        self.rows = RowCache(store, self.layout, NAME, self.nothing)

    def hidden(self, rollouts: Rollouts, deals: Sequence[Deal], kept: KeptHidden | None = None) -> TeacherHidden:
        """As `Teacher.hidden`. Raises `UserError` on all ranks where a row is missing that cannot be computed."""
        began, kept = time.perf_counter(), kept or KeptHidden()
        stored, problems = self.rows.find(rollouts, deals, kept)
        missing = sorted(replica_of_row(deals).keys() - kept.holders_of.keys() - stored.holders_of.keys())
        if missing and not self.chunks:
            raise UserError(self.rows.absent(rollouts, missing, problems))
        for problem in problems:
            self.note(f"teacher cache: {problem}")
        writes = self.rows.make_room(rollouts, missing, self.note)
        used = self._whole_batches(rollouts, deals, stored)
        known = KeptHidden(kept.holders_of | used.holders_of, kept.of_row | used.of_row, not kept.holders_of)
        elapsed = time.perf_counter() - began
        hidden, known = self.look(rollouts, deals, known)
        began, self.known = time.perf_counter(), tuple(used.holders_of)
        written = self.rows.write(rollouts, known, missing) if writes else 0
        self.record = {
            "cache_rows": len(self.known),
            "cache_bytes_read": self.rows.bytes_of(rollouts, self.known),
            "cache_bytes_written": written,
            "time_teacher_cache": elapsed + time.perf_counter() - began,
        }
        return hidden

    def _whole_batches(self, rollouts: Rollouts, deals: Sequence[Deal], stored: KeptHidden) -> KeptHidden:
        """Of the rows on disk those whose micro-batch is there as a whole: the other micro-batches stay as they are.

        Where teacher replicas share experts they need as many micro-batches each: there all rows are, or none.
        """
        batches = [set(rows) for part in self.whole_deals(rollouts, deals) for dealt in part for rows in dealt]
        if self.layout.teacher.ep > 1:
            batches = [set().union(*batches)]
        used = {row for rows in batches if stored.holders_of.keys() >= rows for row in rows}
        return KeptHidden(
            {row: holders for row, holders in stored.holders_of.items() if row in used},
            {row: hidden_TH for row, hidden_TH in stored.of_row.items() if row in used},
        )
