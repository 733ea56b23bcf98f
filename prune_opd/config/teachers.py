"""Settings of several teachers, each for a part of the data.

teachers:
  books: {path: DIR, sources: [ledger]}
  lists: {path: DIR, sources: [reasoning_gym/number_sorting], weight: 0.5, parallel: {tensor: 2}}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prune_opd.config.checks import Checked, Count, Positive
from prune_opd.config.method import HorizonConfig, ObjectiveConfig
from prune_opd.config.teacher import EMA, STUDENT
from prune_opd.config.training import Fp8Config
from prune_opd.errors import ConfigError, located

# What one rollout engine and one mean over the batch can have only once.
SHARED = ("ends", "temperature", "mismatch", "mismatch_low", "mismatch_high", "kernels")

# What a problem calls a run's teacher, and what it is called where there are several.
OF_SEVERAL = {
    "parallel.teacher_": "teachers.{name}.parallel.",
    "precision.teacher_fp8": "teachers.{name}.precision",
    "teacher = ": "teachers.{name}.path = ",
    "the teacher": "the teacher {name}",
}


@dataclass(frozen=True)
class TeacherLayout(Checked, name="teachers.NAME.parallel"):
    """A teacher's own layout over the student's ranks."""

    tensor: Count | None = None  # TP; null: as parallel.teacher_tensor
    pipeline: Count | None = None  # stages; null: as parallel.teacher_pipeline
    expert: Count | None = None  # ranks that share a layer's experts; null: as parallel.teacher_expert


@dataclass(frozen=True)
class TeacherConfig(Checked, name="teachers.NAME"):
    """One of several teachers. What is null here is the run's own setting."""

    path: str  # a Hugging Face directory with the student's tokenizer | student: the student as it begins
    # what it teaches: entries of data.source or data.mixture, or what the rows of a file have as "source"; none: what
    # is called like the teacher
    sources: tuple[str, ...] = ()
    weight: Positive = 1.0  # of its tokens in the loss; the mean stays that over all tokens of all teachers
    parallel: TeacherLayout = field(default_factory=TeacherLayout)
    precision: Fp8Config | None = None  # FP8 of its layers; null: precision.teacher_fp8
    objective: ObjectiveConfig | None = None  # its own; null: the run's
    horizon: HorizonConfig | None = None  # its own; null: the run's settings. The window is its own in any case

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision is not None:
            self.precision.validate("teachers.NAME.precision")


def check_teachers(config: Any) -> None:
    """ConfigError for a `TrainConfig` with both of `teacher` and `teachers`, with neither, or with unfit teachers."""
    teachers = config.teachers
    if not teachers:
        if not config.teacher:
            raise ConfigError("teacher is not set: give a Hugging Face directory, or several by name in teachers")
        if config.data.teacher_column is not None:
            raise ConfigError(
                f"data.teacher_column = {config.data.teacher_column!r} names a teacher for each row, and there is only "
                "one: leave it out, or give several in teachers"
            )
        return
    if config.teacher:
        raise ConfigError(
            f"teacher = {config.teacher!r} and teachers = {', '.join(teachers)} are both set: leave one of them out "
            "(teacher='' with several)"
        )
    for field_name, on in (
        ("teacher_cache.mode", config.teacher_cache.on),
        ("teacher_server.url", config.teacher_server.on),
    ):
        if on:
            raise ConfigError(
                f"{field_name} is set with teachers = {', '.join(teachers)}: what comes from elsewhere is "
                "one teacher's; leave it out, or set teacher"
            )
    for name, teacher in teachers.items():
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            raise ConfigError(f"teachers has the name {name!r}: take letters, digits and _, a letter first")
        if teacher.path == EMA:
            raise ConfigError(
                f"teachers.{name}.path = {EMA}: a moving average of the student is a teacher alone; set "
                f"teacher={EMA}, or give a directory, or {STUDENT}"
            )
        _check_own(config, name, teacher)
    _check_sources(config)
    for name in teachers:
        try:
            alone(config, name)
        except ConfigError as error:
            raise located(f"teachers.{name}", error) from error


def alone(config: Any, name: str) -> Any:
    """A `TrainConfig` as if the teacher of this name were its only one."""
    own, parallel = config.teachers[name], config.parallel
    layout = {
        "teacher_tensor": own.parallel.tensor or parallel.teacher_tensor,
        "teacher_pipeline": own.parallel.pipeline or parallel.teacher_pipeline,
        "teacher_expert": own.parallel.expert or parallel.teacher_expert,
    }
    return replace(
        config,
        teacher=own.path,
        teachers={},
        objective=own.objective or config.objective,
        horizon=own.horizon or config.horizon,
        parallel=replace(parallel, **layout),
        precision=replace(config.precision, teacher_fp8=own.precision or config.precision.teacher_fp8),
        data=replace(config.data, teacher_column=None),
    )


def _check_own(config: Any, name: str, teacher: TeacherConfig) -> None:
    for setting in SHARED if teacher.objective else ():
        own, of_run = getattr(teacher.objective, setting), getattr(config.objective, setting)
        if own != of_run:
            raise ConfigError(
                f"teachers.{name}.objective.{setting} = {own!r} and objective.{setting} = {of_run!r}: rollouts and "
                "their statistics are all teachers'; set both alike"
            )
    if teacher.horizon and teacher.horizon.max_len > config.horizon.max_len:
        raise ConfigError(
            f"teachers.{name}.horizon.max_len = {teacher.horizon.max_len} is above horizon.max_len = "
            f"{config.horizon.max_len}, the most that the rollout engine is built for: raise that, or lower this"
        )


def _check_sources(config: Any) -> None:
    """Each source has one teacher. What the rows of a file say is seen when they are read (data/routing.py)."""
    taught = by_source(config.teachers)
    if config.data.teacher_column is not None:
        return
    for source in config.data.sources:
        if teacher_of_source(taught, source) is None and not Path(source).suffix and not Path(source).is_dir():
            raise ConfigError(
                f"no teacher has the source {source!r} of the data: name it in the sources of one of "
                f"{', '.join(f'teachers.{name}' for name in config.teachers)}"
            )


def by_source(teachers: Mapping[str, TeacherConfig]) -> dict[str, str]:
    """Source → the name of its teacher. ConfigError where two have the same."""
    found: dict[str, str] = {}
    for name, teacher in teachers.items():
        for source in teacher.sources or (name,):
            if (other := found.setdefault(source, name)) != name:
                raise ConfigError(
                    f"teachers.{name}.sources and teachers.{other}.sources both have {source!r}: a prompt has one "
                    "teacher; leave it out of one of them"
                )
    return found


def teacher_of_source(taught: Mapping[str, str], source: str) -> str | None:
    """The teacher of an entry of data.source or data.mixture, by its full name, or a file's without its ending."""
    return taught.get(source) or taught.get(Path(source).stem)


def own_names(name: str, problem: str) -> str:
    """A problem of `alone` under the names that the settings have among several. name: "" where there is one."""
    for of_one, of_several in OF_SEVERAL.items() if name else ():
        problem = problem.replace(of_one, of_several.format(name=name))
    return problem
