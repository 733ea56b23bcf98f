"""`prune-opd plan --search`: the layouts of student, teacher and engine, and the fastest that fit together.

A step's seconds are a sum of three terms, and each depends on one of the three layouts. So all combinations are sorted
by time first, and the memory is worked out from the fastest on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from prune_opd.config import TrainConfig
from prune_opd.config.memory_phases import ENGINE, GRADIENTS, STUDENT, TEACHER
from prune_opd.config.yaml import on_one_line
from prune_opd.errors import ConfigError
from prune_opd.plan.fit import problems
from prune_opd.plan.lengths import mean_horizon, steps_by_horizon
from prune_opd.plan.memory import plan_memory
from prune_opd.plan.planner import structure
from prune_opd.plan.setting import Setting, setting_of
from prune_opd.plan.time import mean_step, step_time

SIZES = (1, 2, 4, 8)
EXPERTS = (1, 2, 4, 8, 16, 32)
CHUNKS = (1, 2, 4)  # parallel.virtual_pipeline
CONTEXTS = SIZES
SHARE = "rollout.gpu_memory_utilization"
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7)
UNCUT = {  # student, teacher and engine whole on every rank
    **dict.fromkeys(("parallel.tensor", "parallel.pipeline", "parallel.virtual_pipeline"), 1),
    **dict.fromkeys(("parallel.context", "parallel.expert", "rollout.tensor_parallel"), 1),
    **dict.fromkeys(("parallel.teacher_tensor", "parallel.teacher_pipeline", "parallel.teacher_expert"), 1),
    "parallel.sequence_parallel": False,
}
TRIED = 20_000  # combinations whose memory is worked out, at most


class Part(NamedTuple):
    """A layout of the student, the teacher or the engine."""

    seconds: float  # of its phases
    start: float  # bytes that it has on the GPU at least when everything is built
    cuts: float  # how much it is cut up: the sum of its sizes
    changes: dict[str, Any]  # its settings


@dataclass(frozen=True)
class Found:
    """A layout that fits: seconds of a step at the mean horizon, and the overrides that make it."""

    seconds: float
    overrides: tuple[str, ...]


def best_layouts(config: TrainConfig, gpu: str, nodes: int, count: int = 5) -> list[Found]:
    """The layouts that fit, the fastest first; of equally fast ones, those that cut up less. Empty if nothing fits."""
    if config.teachers:
        raise ConfigError(
            f"plan --search with teachers = {', '.join(config.teachers)}: the search lays out one teacher; search with "
            "each alone (teacher=DIR), and set teachers.NAME.parallel by it"
        )
    setting = setting_of(config, gpu, nodes)
    student = _timed(setting, _students(setting), ("train", "all-reduce"), (STUDENT, GRADIENTS))
    teacher = _timed(setting, _teachers(setting), ("teacher",), (TEACHER,))
    engine = _smallest(_timed(setting, _engines(setting), ("rollout",), ENGINE))
    room = plan_memory(setting).limit
    combined = sorted(
        (a.seconds + b.seconds + c.seconds, a.cuts + b.cuts + c.cuts, i, (a, b, c))
        for i, (a, b, c) in enumerate(itertools.product(student, teacher, engine))
        if a.start + b.start + c.start <= room
    )
    found: list[Found] = []
    seen = set()  # layouts that are in `found` already, with a smaller share of memory for the engine
    for _, _, _, parts in combined[:TRIED]:
        changes = {key: value for part in parts for key, value in part.changes.items()}
        candidate = _changed(setting, changes)
        layout = tuple(value for key, value in changes.items() if key != SHARE)
        if layout in seen or structure(candidate.config, candidate.world):
            continue
        memory = plan_memory(candidate)
        if not problems(candidate, memory):
            total = mean_step(candidate, steps_by_horizon(candidate.config), memory.cache_tokens).total
            found.append(Found(total, tuple(f"{key}={on_one_line(value)}" for key, value in changes.items())))
            seen.add(layout)
            if len(found) == count:
                break
    return found


def _students(setting: Setting) -> Iterator[dict[str, Any]]:
    experts = EXPERTS if setting.student.moe else (1,)
    sizes = itertools.product(SIZES, SIZES, CHUNKS, CONTEXTS, experts, ("none", "full"))
    for tensor, pipeline, chunks, context, expert, recompute in sizes:
        if (chunks > 1 and pipeline == 1) or tensor * pipeline * context > setting.world:
            continue
        yield {
            "parallel.tensor": tensor,
            "parallel.pipeline": pipeline,
            "parallel.virtual_pipeline": chunks,
            "parallel.context": context,
            "parallel.expert": expert,
            "parallel.sequence_parallel": tensor > 1,
            "parallel.recompute": recompute,
        }


def _teachers(setting: Setting) -> Iterator[dict[str, Any]]:
    experts = EXPERTS if setting.teacher.moe else (1,)
    for tensor, pipeline, expert in itertools.product(SIZES, SIZES, experts):
        yield {
            "parallel.teacher_tensor": tensor,
            "parallel.teacher_pipeline": pipeline,
            "parallel.teacher_expert": expert,
        }


def _engines(setting: Setting) -> Iterator[dict[str, Any]]:
    for tensor, share in itertools.product(SIZES, SHARES):
        yield {"rollout.tensor_parallel": tensor, SHARE: share}


def _timed(
    setting: Setting, candidates: Iterator[dict[str, Any]], phases: tuple[str, ...], parts: tuple[str, ...]
) -> list[Part]:
    """The candidates that ranks, heads and layers allow, with the seconds of `phases` and the bytes of `parts`."""
    found = []
    horizon = mean_horizon(setting.config)
    longest = setting.config.rollout.max_prompt_len + setting.config.horizon.max_len
    for changes in candidates:
        alone = _changed(setting, UNCUT | changes)
        if structure(alone.config, alone.world):
            continue
        memory = plan_memory(alone)
        if "rollout" in phases and memory.cache_tokens < longest:
            continue
        seconds = step_time(alone, horizon, memory.cache_tokens, phases).seconds
        start = sum(memory.parts[part] for part in parts)
        cuts = sum(value for value in changes.values() if isinstance(value, int | float))
        found.append(Part(round(sum(seconds.values()), 3), start, cuts, changes))
    return found


def _smallest(engines: list[Part]) -> list[Part]:
    """Of engines with the same speed and tensor_parallel, the one with least memory; shares come in ascending order."""
    first: dict[tuple[float, int], Part] = {}
    for engine in engines:
        first.setdefault((engine.seconds, engine.changes["rollout.tensor_parallel"]), engine)
    return list(first.values())


def _changed(setting: Setting, changes: dict[str, Any]) -> Setting:
    parts: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        part, name = key.split(".")
        parts.setdefault(part, {})[name] = value
    config = setting.config
    made = {part: replace(getattr(config, part), **values) for part, values in parts.items()}
    return replace(setting, config=replace(config, **made))
