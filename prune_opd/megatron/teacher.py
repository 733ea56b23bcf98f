"""The teacher pass: forward only, and only the last hidden states are kept (idea 3 of the design)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from prune_opd.config import Fp8Config
from prune_opd.loss import Head
from prune_opd.megatron.layout import Layout
from prune_opd.megatron.model import HiddenStatesGPT, build
from prune_opd.megatron.packing import PackedBatch, pack_rows
from prune_opd.megatron.precision import NO_FP8, transformer_arguments
from prune_opd.megatron.redistribute import (
    KeptHidden,
    TeacherHidden,
    find_routes,
    redistribute,
    replica_of_row,
    sources_of_row,
)
from prune_opd.megatron.schedule import forward
from prune_opd.model_spec import ModelSpec
from prune_opd.process import tell
from prune_opd.rollout.balance import Deal, deal_any
from prune_opd.rollout.batch import Rollouts
from prune_opd.weights.load import read_head


class Teacher:
    """A frozen model in its own layout over the student's ranks: no gradients, no optimizer, no DDP buffers.

    Its output matrix is not on its own last stage but where the loss is: on the student's last stage, cut over the
    student's TP ranks. It is read from the directory in that cut, so nothing is gathered, and costs each of those ranks
    padded vocabulary / student's TP × hidden numbers.

    Without its layers it has nothing but that head, and all rows must be known already (`elsewhere/`).

    A teacher with experts that is cut over TP ranks has sequence parallelism: each rank then sends its own tokens to
    the experts, where otherwise all of them would send the same ones.
    """

    note: Callable[[str], None] = staticmethod(tell)  # gets what a person should know

    def __init__(
        self,
        model_dir: str | Path,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        token_budget: int,
        fp8: Fp8Config = NO_FP8,
        layers: bool = True,
    ):
        self.spec = ModelSpec.read(model_dir)
        cut = self.spec.moe is not None and layout.teacher.tp > 1
        layout = replace(layout, teacher=replace(layout.teacher, sequence_parallel=cut))
        self.layout, self.device, self.token_budget = layout, device, token_budget
        self.record: dict[str, float] = {}  # the last pass's part of a step record
        self.known: tuple[int, ...] = ()  # rows of the last batch that came from elsewhere
        self.chunks: list[HiddenStatesGPT] = []
        if layers:
            settings = transformer_arguments(fp8)
            chunks = build(model_dir, layout.teacher, dtype, trainable=False, head=False, settings=settings)
            self.chunks = [chunk.to(device) for chunk in chunks]
        self.nothing = torch.empty(0, self.spec.hidden, dtype=dtype, device=device)
        self._head_weight = self._read_head(model_dir, dtype) if layout.student.is_last_stage else None

    @property
    def head_weight(self) -> Tensor:
        """Rows of the output matrix [V/tp, H] for the student's TP rank; on the student's last stage only."""
        assert self._head_weight is not None, "only the student's last stage computes the loss"
        return self._head_weight

    def view(self, hidden_MH: Tensor) -> Head:
        """Some tokens' hidden states as the loss takes them."""
        return Head(hidden_MH, self.head_weight)

    def hidden(self, rollouts: Rollouts, deals: Sequence[Deal], kept: KeptHidden | None = None) -> TeacherHidden:
        """The hidden states of the rows that this rank trains on (none but on the student's last stage).

        deals: the student's, one of each update. kept: rows that need no computing. Collective over the whole job.
        """
        return self.look(rollouts, deals, kept)[0]

    def look(
        self, rollouts: Rollouts, deals: Sequence[Deal], kept: KeptHidden | None = None
    ) -> tuple[TeacherHidden, KeptHidden]:
        """`hidden`, and all that the teacher knows now, where it was computed."""
        kept = kept or KeptHidden()
        ours = self._deals(rollouts, deals, kept)
        could_hold = {row: self._last_stages[replica] for row, replica in replica_of_row(ours).items()}
        lengths = rollouts.length_B
        routes = find_routes(kept.holders_of | could_hold, replica_of_row(deals), self.layout.student, lengths)
        sources = sources_of_row(routes)
        hidden_of = kept.of_row | self._compute(rollouts, ours, sources)
        known = KeptHidden(kept.holders_of | {row: sources[row] for row in could_hold}, hidden_of)
        return redistribute(hidden_of, lengths, routes, self.nothing), known

    @cached_property
    def _last_stages(self) -> list[tuple[int, ...]]:
        """The ranks of each replica's last stage."""
        teacher = self.layout.teacher
        return [tuple(teacher.last_stage_ranks(replica)) for replica in range(teacher.dp)]

    def _compute(
        self, rollouts: Rollouts, deals: Sequence[Deal], sources: Mapping[int, Sequence[int]]
    ) -> dict[int, Tensor]:
        """This replica's part of the deals. Every TP rank computes all of it and keeps the rows that it is to send."""
        mine = [rows for part in deals for rows in part[self.layout.teacher.dp_rank]]
        if not mine:
            return {}
        prompts, responses = rollouts.teacher_prompt_ids, rollouts.response_ids
        multiple = self.chunks[0].token_multiple
        batches = [pack_rows(prompts, responses, rows, self.device, multiple) for rows in mine]
        hidden_of: dict[int, Tensor] = {}

        def keep(batch: PackedBatch, hidden_NH: Tensor) -> None:
            parts = batch.predicting_M.split([rollouts.length_B[row] for row in batch.rows])
            own = [(row, part) for row, part in zip(batch.rows, parts, strict=True) if self.layout.rank in sources[row]]
            if not own:
                return
            kept_MH = hidden_NH[torch.cat([part for _, part in own])]
            hidden_of.update(zip((row for row, _ in own), kept_MH.split([len(part) for _, part in own]), strict=True))

        forward(self.chunks, self.layout.teacher, batches, keep)
        return hidden_of

    def _deals(self, rollouts: Rollouts, deals: Sequence[Deal], kept: KeptHidden) -> Sequence[Deal]:
        """`whole_deals` without the rows that are known.

        Where these are whole micro-batches, the others stay as they are: a row that is computed has the neighbours that
        it always has, and so the same hidden states to the last bit. Else the rows that are left are dealt anew.
        """
        whole, known = self.whole_deals(rollouts, deals), kept.holders_of.keys()
        if not known:
            return whole
        if kept.whole_batches:
            return [[[rows for rows in dealt if not known >= set(rows)] for dealt in part] for part in whole]
        rows = sorted(replica_of_row(deals).keys() - known)
        replicas = self.layout.teacher.dp
        return [deal_any(rollouts.teacher_row_length_B, rows, replicas, self.token_budget)] if rows else []

    def whole_deals(self, rollouts: Rollouts, deals: Sequence[Deal]) -> Sequence[Deal]:
        """The teacher's deal of all rows: with as many replicas as the student has, the student's: rows stay put.

        Not with context parallelism, whose micro-batches are as many times as large: the teacher does not share them.
        Nor when the teacher reads prompts of its own, whose rows do not fill the budget as the student's do.
        """
        replicas, student = self.layout.teacher.dp, self.layout.student
        if replicas == student.dp and student.cp == 1 and not rollouts.hinted:
            return deals
        return [deal_any(rollouts.teacher_row_length_B, sorted(replica_of_row(deals)), replicas, self.token_budget)]

    def _read_head(self, model_dir: str | Path, dtype: torch.dtype) -> Tensor:
        tp = self.layout.student.groups.tp
        if self.spec.tied and self.chunks and self.chunks[0].pre_process and self.layout.teacher.tp == tp.size():
            return self.chunks[0].embedding.word_embeddings.weight  # the very rows
        return read_head(model_dir, self.spec, tp.rank(), tp.size()).to(self.device, dtype)
