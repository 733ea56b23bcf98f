"""Several teachers over the same ranks, each in its own layout, one after the other in a teacher pass.

A row has one teacher (`Prompt.teacher`) and a micro-batch the rows of one (train_batch.py). So a pass is each teacher's
own pass over its part of the deals, and the loss takes the head and the hidden states of a micro-batch's teacher. Their
hidden sizes, vocabularies' paddings and layouts need not be alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_opd.config import TrainConfig
from prune_opd.config.memory_phases import Handler, part_of
from prune_opd.megatron.layout import Layout, with_teacher
from prune_opd.megatron.make_teacher import make_teacher
from prune_opd.megatron.model import HiddenStatesGPT
from prune_opd.megatron.offload import teacher_mover
from prune_opd.megatron.redistribute import KeptHidden, TeacherHidden
from prune_opd.megatron.teacher import Teacher
from prune_opd.model_spec import ModelSpec
from prune_opd.platform import Platform
from prune_opd.process import tell
from prune_opd.rollout.balance import Deal
from prune_opd.rollout.batch import Rollouts


@dataclass(frozen=True)
class HiddenOfTeachers:
    """The teachers' hidden states of a step, by name; a teacher without rows has none."""

    of: Mapping[str, TeacherHidden]

    @property
    def of_row(self) -> dict[int, Tensor]:
        return {row: hidden for teacher in self.of.values() for row, hidden in teacher.of_row.items()}


class Teachers:
    """The teachers of a run by name, with the methods that a run uses of one `Teacher`.

    turn: called with a teacher's name before its pass, to bring its layers onto the device and send the others' away
    (config/memory_phases.py).
    """

    def __init__(self, of: Mapping[str, Teacher], turn: Callable[[str], None] = lambda name: None) -> None:
        self.of, self.turn = dict(of), turn
        self.record: dict[str, float] = {}  # nothing of theirs comes from elsewhere
        self.known: tuple[int, ...] = ()

    @property
    def spec(self) -> ModelSpec:
        """That with the fewest ids: all models know them."""
        return min((teacher.spec for teacher in self.of.values()), key=lambda spec: spec.vocab_size)

    @property
    def layout(self) -> Layout:
        """The student's part of it is that of all."""
        return next(iter(self.of.values())).layout

    @property
    def chunks(self) -> list[HiddenStatesGPT]:
        """The layers of all of them."""
        return [chunk for teacher in self.of.values() for chunk in teacher.chunks]

    def hidden(self, rollouts: Rollouts, deals: Sequence[Deal], kept: KeptHidden | None = None) -> HiddenOfTeachers:
        """See `Teacher.hidden`. Collective over the whole job."""
        return self.look(rollouts, deals, kept)[0]

    def look(
        self, rollouts: Rollouts, deals: Sequence[Deal], kept: KeptHidden | None = None
    ) -> tuple[HiddenOfTeachers, KeptHidden]:
        """See `Teacher.look`. All ranks know all rows, so they skip the same teachers: those without any."""
        kept = kept or KeptHidden()
        known, found = KeptHidden(), {}
        for name, teacher in self.of.items():
            rows = {row for row, prompt in enumerate(rollouts.prompts) if prompt.teacher == name}
            if not rows:
                found[name] = TeacherHidden({}, teacher.nothing)
                continue
            self.turn(name)
            theirs = KeptHidden(
                {row: where for row, where in kept.holders_of.items() if row in rows},
                {row: hidden for row, hidden in kept.of_row.items() if row in rows},
            )
            found[name], seen = teacher.look(rollouts, [of_rows(deal, rows) for deal in deals], theirs)
            known.holders_of.update(seen.holders_of)
            known.of_row.update(seen.of_row)
        return HiddenOfTeachers(found), known


def of_rows(deal: Deal, rows: set[int]) -> Deal:
    """The micro-batches of a deal in which any rank has some of these rows, and those rows of them.

    One that is empty on a rank stays there: ranks that share a teacher's experts run every micro-batch together.
    """
    count = max(map(len, deal))
    kept = [i for i in range(count) if any(not rows.isdisjoint(part[i]) for part in deal)]
    return [[[row for row in part[i] if row in rows] for i in kept] for part in deal]


@dataclass
class Built:
    """The teacher of a run, or `Teachers`. notes: what is to be said of them.

    away: the parts whose layers have left the device, each to make room for the next. movers: what brings them back.
    """

    teacher: Any = None
    notes: list[str] = field(default_factory=list)
    away: list[str] = field(default_factory=list)
    movers: dict[str, Handler] = field(default_factory=dict)


Test = Callable[[str, TrainConfig, Any], str | None]  # (its name, its own config, it) → what is to be said of it


def build_teachers(
    config: TrainConfig,
    layout: Layout,
    dtype: torch.dtype,
    machine: Platform,
    run_dir: Path,
    test: Test = lambda name, own, teacher: None,
) -> Built:
    """Build the teacher, or all of them: each is tested before the next is built. Collective over the job."""
    built, found = Built(), dict[str, Any]()
    for name, own in config.by_teacher.items():
        where = with_teacher(layout, own.parallel) if name else layout
        tell(f"teacher: {own.teacher}")
        found[name] = make_teacher(own, where, dtype, machine.device, run_dir)
        if said := test(name, own, found[name]):
            built.notes.append(f"{name}: {said}" if name else said)
        if name and config.memory.offload_teacher:
            built.away.append(part_of(name))
            if not machine.is_cpu:
                built.movers[part_of(name)] = mover = teacher_mover(found[name], machine)
                mover.offload()
    built.teacher = Teachers(found) if config.teachers else found[""]
    return built
