"""The in-flight gate with several teachers: each response is looked at by its own, with its own calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prune_opd.config import TrainConfig
from prune_opd.data.prompt import Prompt
from prune_opd.inflight.gate import InflightGate, courses
from prune_opd.inflight.look_schedule import LookSchedule
from prune_opd.method.by_teacher import CalibrationByTeacher
from prune_opd.method.calibration import Calibration, Usual
from prune_opd.rollout.batch import Response, Rollouts
from prune_opd.rollout.stepwise import Prefix

if TYPE_CHECKING:
    from prune_opd.megatron.layout import Layout
    from prune_opd.megatron.redistribute import KeptHidden
    from prune_opd.megatron.teachers import Teachers


class InflightGates:
    """An `InflightGate` for each teacher, as one watch (`rollout.stepwise.Watch`).

    The looks are the engine's and so the same for all; each gate gets the prefixes of its own rows. All ranks know all
    prefixes, so they leave out the same gates where a meeting has none of their rows.
    """

    def __init__(self, config: TrainConfig, teachers: Teachers, layout: Layout, vocab_size: int) -> None:
        self.teachers = teachers
        self.of = {
            name: InflightGate(own, teachers.of[name], layout, vocab_size) for name, own in config.by_teacher.items()
        }
        self.settings = config.rollout.inflight
        self.top = next(iter(self.of.values())).top  # all have the run's gate, and so the same
        self.schedule = LookSchedule(self.settings.price)
        self.chosen: tuple[int, ...] = ()  # the batch's looks
        self.begin([], [], [])

    def calibrate(self, usual: Mapping[str, Usual | None]) -> None:
        """Judge from now on by what is usual for each pair, for a gate that does."""
        for name, gate in self.of.items():
            gate.calibrate(usual[name])

    def looks(self, max_tokens: int) -> tuple[int, ...]:
        self.chosen = self.schedule.choose(self.settings.looks(max_tokens))
        return self.chosen

    def begin(
        self, prompt_of_row: Sequence[Prompt], max_tokens_of_row: Sequence[int], begun_of_row: Sequence[Response]
    ) -> None:
        """See `InflightGate.begin`. Every gate knows all rows by their numbers, and is asked for its own."""
        self.teacher_of_row = [prompt.teacher for prompt in prompt_of_row]
        for gate in self.of.values():
            gate.begin(prompt_of_row, max_tokens_of_row, begun_of_row)

    def keep(self, rows: Sequence[int]) -> None:
        self.teacher_of_row = [self.teacher_of_row[row] for row in rows]
        for gate in self.of.values():
            gate.keep(rows)

    def stop(self, prefixes: Sequence[Prefix]) -> set[int]:
        """See `InflightGate.stop`. Collective over the job: the teachers take turns."""
        stopped: set[int] = set()
        for name, gate in self.of.items():
            if own := [prefix for prefix in prefixes if self.teacher_of_row[prefix.row] == name]:
                self.teachers.turn(name)
                stopped |= gate.stop(own)
        return stopped

    @property
    def kept(self) -> KeptHidden:
        """What the teachers know of rows that ended in flight."""
        from prune_opd.megatron.redistribute import KeptHidden

        found: KeptHidden = KeptHidden()
        for gate in self.of.values():
            found.holders_of.update(gate.kept.holders_of)
            found.of_row.update(gate.kept.of_row)
        return found

    @property
    def limits(self) -> list[int]:
        return next(iter(self.of.values())).limits

    def learn(self, rollouts: Rollouts, reliable_length_B: Tensor) -> None:
        """Take in how a batch went; the looks of the next batch are chosen by it, for all teachers together."""
        self.schedule.learn(courses(rollouts, reliable_length_B.tolist(), self.limits, self.chosen))

    def record(self, rollouts: Rollouts, reliable_length_B: Tensor) -> dict[str, Any]:
        """What the gates did to the batch, for metrics.jsonl: rows are counted once, the teachers' work is summed."""
        gates = list(self.of.values())
        record = gates[0].record(rollouts, reliable_length_B)
        kept = self.kept.holders_of
        return record | {
            "teacher_tokens_inflight": sum(gate.teacher_tokens for gate in gates),
            "teacher_tokens_reused": sum(rollouts.teacher_row_length_B[row] for row in kept),
            "inflight_checks": sum(gate.checks for gate in gates),
            "time_inflight": sum(gate.seconds for gate in gates),
        }


def make_inflight(
    config: TrainConfig, teacher: Any, layout: Layout, vocab_size: int
) -> InflightGate | InflightGates | None:
    """The in-flight gate of a run, with several teachers one for each; None if it has none."""
    if not config.rollout.inflight.on:
        return None
    return (InflightGates if config.teachers else InflightGate)(config, teacher, layout, vocab_size)


def calibrate(gate: InflightGate | InflightGates, calibration: Calibration | CalibrationByTeacher) -> None:
    """Have each gate judge by what is usual for its pair."""
    if isinstance(gate, InflightGates) and isinstance(calibration, CalibrationByTeacher):
        gate.calibrate(calibration.usual_of)
    elif isinstance(gate, InflightGate):
        gate.calibrate(calibration.usual)
