"""With several teachers: a horizon and a calibration of the gate for each, as one object each for the run.

What is usual for the student and one teacher is not usual for it and another, and how far its responses stay reliable
is a question of that teacher's task. So each has a controller and a calibration of its own (ours).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from prune_opd.config import TrainConfig
from prune_opd.errors import ConfigError
from prune_opd.method.calibration import Calibration, Usual
from prune_opd.method.horizon import HorizonController, PlateauHorizon, make_controller


class Seen(Protocol):
    """What a step has shown of a teacher's responses (`loss.stats.BatchStats`)."""

    early: Any
    early_kl: Any

    def near(self, end: int, tokens: int) -> dict[str, float] | None: ...


class Taught(Protocol):
    """A prompt that has a teacher (`data.prompt.Prompt`)."""

    @property
    def teacher(self) -> str: ...


class HorizonByTeacher:
    """A controller for each teacher, each of which sees its own responses alone."""

    def __init__(self, config: TrainConfig) -> None:
        self.of = {name: make_controller(own.horizon) for name, own in config.by_teacher.items()}

    @property
    def horizon(self) -> int:
        """The longest of the teachers': what any response of the next batch may have."""
        return max(controller.horizon for controller in self.of.values())

    def update(self, reliable_length_B: Iterable[Any], length_B: Iterable[Any], finished_B: Iterable[Any]) -> None:
        raise TypeError("each teacher's controller is updated with its own rows: HorizonByTeacher.of[name].update")

    def of_prompt(self, prompt: Taught) -> int:
        """The horizon of its teacher."""
        return self.of[prompt.teacher].horizon

    def record(self) -> dict[str, int]:
        """Its part of a step record."""
        return {f"horizon_of_{name}": controller.horizon for name, controller in self.of.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"teachers": {name: controller.state_dict() for name, controller in self.of.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint's state. ConfigError for other teachers than its, once those it has are taken over."""
        _load(self.of, state, "horizon")


class CalibrationByTeacher:
    """A calibration of the gate for each teacher: what is usual for the pair of it and the student."""

    def __init__(self, config: TrainConfig) -> None:
        self.of = {name: Calibration(own.gate) for name, own in config.by_teacher.items()}

    @property
    def usual(self) -> None:
        """Of no pair alone: `usual_of`."""

    @property
    def usual_of(self) -> dict[str, Usual | None]:
        return {name: calibration.usual for name, calibration in self.of.items()}

    def record(self) -> dict[str, float]:
        found = {name: calibration.record() for name, calibration in self.of.items()}
        return {f"{key}_of_{name}": value for name, record in found.items() for key, value in record.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"teachers": {name: calibration.state_dict() for name, calibration in self.of.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As that of `HorizonByTeacher`."""
        _load(self.of, state, "gate calibration")


def move(
    controller: HorizonController,
    calibration: Calibration,
    seen: Seen,
    rows: Sequence[Any],
    reused: bool,
) -> None:
    """Let one pair's controller and calibration see a step; reused rollouts have the horizon that they have.

    rows: reliable_length_B, length_B and finished_B of the pair's responses.
    """
    if not reused:
        if isinstance(controller, PlateauHorizon):
            controller.see(seen.near(controller.horizon, controller.margin))
        controller.update(*rows)
    calibration.update(seen.early.tolist(), float(seen.early_kl))


def move_each(
    controller: HorizonController | HorizonByTeacher,
    calibration: Calibration | CalibrationByTeacher,
    seen: Any,
    teacher_B: Sequence[str],
    rows: Sequence[Any],
    reused: bool,
) -> None:
    """`move` with a step, for each teacher its own part of it (`seen.parts`); not for one that had no response."""
    if not isinstance(controller, HorizonByTeacher) or not isinstance(calibration, CalibrationByTeacher):
        move(controller, calibration, seen, rows, reused)  # type: ignore[arg-type]
        return
    for name, part in seen.parts.items():
        if theirs := [row for row, teacher in enumerate(teacher_B) if teacher == name]:
            own = [[column[row] for row in theirs] for column in rows]
            move(controller.of[name], calibration.of[name], part, own, reused)


def _load(parts: Mapping[str, HorizonController] | Mapping[str, Calibration], state: dict[str, Any], what: str) -> None:
    saved = state.get("teachers")
    if saved is None:
        raise ConfigError(
            f"the checkpoint's {what} is that of a single teacher, this run has teachers = {', '.join(parts)}: restore "
            "the one teacher to resume, or start a new run"
        )
    for name in parts.keys() & saved.keys():
        parts[name].load_state_dict(saved[name])
    if parts.keys() != saved.keys():
        raise ConfigError(
            f"the checkpoint has a {what} for the teachers {', '.join(saved)}, this run has {', '.join(parts)}: "
            "restore those teachers to resume, or start a new run"
        )
