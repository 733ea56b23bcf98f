"""The student as its own teacher: frozen as it begins, or as the moving average of what it becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval

from prune_opd.config.checks import Checked
from prune_opd.config.training import PrecisionConfig
from prune_opd.errors import ConfigError

STUDENT, EMA = "student", "ema"  # what `teacher` may be beside a directory


@dataclass(frozen=True)
class TeacherEmaConfig(Checked, name="teacher_ema"):
    """teacher = ema: after each step, average ← decay · average + (1 − decay) · student."""

    decay: Annotated[float, Interval(ge=0, lt=1)] = 0.99  # of a step: about 1 / (1 − decay) steps are averaged


def check_own_teacher(teacher: str, ema: TeacherEmaConfig, precision: PrecisionConfig) -> None:
    """ConfigError where a moving average cannot be kept, or its settings would have no effect."""
    if teacher != EMA:
        if ema != TeacherEmaConfig():
            raise ConfigError(
                f"teacher_ema.decay = {ema.decay:g} with teacher = {teacher!r}: there is no average; set teacher=ema, "
                "or leave it out"
            )
        return
    for role in ("student_fp8", "teacher_fp8"):
        if getattr(precision, role).param:
            raise ConfigError(
                f"teacher = ema with precision.{role}.param = true: an average of weights that are rounded to FP8 "
                f"stands still; set precision.{role}.param=false"
            )
