"""`metrics.jsonl`: what a run measures, one JSON object a line (summary.py adds it up).

The file is the record of a run: console, wandb and report only show what is in it. A *step record* (steps 1..N) is
written after each optimizer step; an *evaluation line* carries the `eval_*` keys under the number of steps finished by
then, so the evaluation before training has step 0. `meanings` says what each key means.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from prune_opd.config.run import RESULT_SUFFIXES
from prune_opd.errors import UserError

Record = dict[str, Any]

FILE_NAME = "metrics.jsonl"

PHASES: dict[str, str] = {
    "time_sync": "weight sync",
    "time_rollout": "rollout",
    "time_reward": "reward",
    "time_teacher": "teacher",
    "time_train": "train",
}
"""The timed phases of a step, in the order in which they run; the rest of `time_step` is "other"."""

CLOCKED = ("time_", "cpu_", "memory_", "taken_", "flops_", "speed_", "mfu_", "planned_", "cache_", "served_")
"""What the keys begin with that the clock, the machine or its disk decides: there equal runs may differ."""

_NAMED = 8  # places of a file that a sentence names
# What a step record says of each of several teachers, as overlap_of_NAME.
OF_TEACHER = (
    *("horizon", "overlap", "event_rate", "weight_mean", "divergence", "reverse_kl", "teacher_logp", "tokens"),
    *("reliable_length", "response_length", "usual_overlap", "usual_kl", "usual_acceptance", "usual_deviation"),
)
EVAL_PREFIX, STDERR_SUFFIX = "eval_", "_stderr"


@functools.cache
def meanings() -> dict[str, str]:
    """Every key of metrics.jsonl with meaning and unit; `<task>`, `<id>` and `<teacher>` stand for a task's name, a
    token id and the name of one of several teachers."""
    text = (Path(__file__).parent / "assets" / "metrics.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def meaning(key: str) -> str | None:
    """The meaning of a key as it is written, None if there is none: `eval_ledger` is `eval_<task>`, `end_share_2`
    is `end_share_<id>`."""
    pattern = re.sub(rf"^eval_(.+?)({'|'.join(RESULT_SUFFIXES)})?$", r"eval_<task>\2", key)
    pattern = re.sub(r"^(end_mass_student|end_mass_teacher|end_share)_\d+$", r"\1_<id>", pattern)
    pattern = re.sub(rf"^({'|'.join(OF_TEACHER)})_of_\w+$", r"\1_of_<teacher>", pattern)
    return meanings().get(key) or meanings().get(pattern)


@functools.cache
def teacher_names(keys: frozenset[str]) -> tuple[str, ...]:
    """The teachers that a step record with these keys speaks of, several in one run; empty with one."""
    return tuple(sorted(key.removeprefix("horizon_of_") for key in keys if key.startswith("horizon_of_")))


def is_evaluation(record: Record) -> bool:
    """Whether a line is an evaluation's (it has `eval_*` keys) and not a step's."""
    return any(key.startswith(EVAL_PREFIX) for key in record)


def task_names(evaluation: Record) -> list[str]:
    """The tasks an evaluation line has an accuracy for, in its order; one may be called `math_high`."""
    further = {f"{key}{suffix}" for key in evaluation for suffix in RESULT_SUFFIXES} | {"eval_response_length"}
    return [key.removeprefix(EVAL_PREFIX) for key in evaluation if key.startswith(EVAL_PREFIX) and key not in further]


def readable(line: Record, prefix: str = "") -> tuple[int, int] | None:
    """(answers that could be read, all answers), from the keys `readable` and `answers` after `prefix`.

    None for a line that is older than those keys.
    """
    share, answers = line.get(f"{prefix}readable"), line.get(f"{prefix}answers")
    return None if share is None or answers is None else (round(share * answers), answers)


def full_kl(step: Record) -> float | None:
    """A step's reverse KL over the whole vocabulary [nats]: exact where known, else estimated from the samples."""
    exact = step.get("reverse_kl")
    return exact if exact is not None else step.get("reverse_kl_sampled")


class MetricsLog:
    """The append-only writer of a file of records (metrics.jsonl, samples.jsonl). Lines are flushed one by one.

    Args:
        path: the file; its folder is made if need be.
        keep_through: lines up to and including this step stay (a resumed run writes the later ones again). None starts
            anew; what was there is kept beside the file as `<name>.previous.jsonl`.

    Raises:
        UserError: a line that must be kept is not a JSON object.
    """

    def __init__(self, path: Path, keep_through: int | None) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            if keep_through is None:
                os.replace(path, path.with_suffix(".previous.jsonl"))
            else:
                _truncate(path, keep_through)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Appends one record. Floats are written so that reading gives the same bits; tensor scalars are accepted.

        Raises:
            ValueError: the record has no step, which a resumed run would need to know.
        """
        if not isinstance(record.get("step"), int):
            raise ValueError(f"a metrics record needs an integer step, this one has {record.get('step')!r}")
        self._file.write(_dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> tuple[list[Record], list[Record]]:
    """The step records and the evaluation lines of a metrics file, each in order of their steps.

    A last line that was cut off is left out, and so are steps that stand there twice with different values; of equal
    ones the later line counts. `read_doubts` says so: whoever shows the records shows that too.

    Raises:
        UserError: there is no such file, or a line before the last is not a JSON object with a step.
    """
    if path.parent.is_file():
        raise UserError(f"{path.parent} is a file: give the directory of its run, {path.parent.parent}")
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a run directory whose training has logged at least one step")
    steps: dict[int, Record] = {}
    evaluations: dict[int, Record] = {}
    for record in settle(read_records(path), _place)[0]:
        kind = evaluations if is_evaluation(record) else steps
        kind[record["step"]] = kind.get(record["step"], {}) | record
    return [steps[step] for step in sorted(steps)], [evaluations[step] for step in sorted(evaluations)]


def read_doubts(path: Path) -> list[str]:
    """What keeps a metrics file from being the record of one run: a sentence each, that names the file. [] if nothing.

    Raises:
        UserError: as `read_metrics`.
    """
    lines = read_records(path)
    numbers = {record["step"] for record in lines if not is_evaluation(record)}
    missing = sorted(set(range(1, max(numbers, default=0))) - numbers)
    found = doubts(path, lines, _place)
    return found + ([f"{path} has no record of {_these(missing)}: no total counts them"] if missing else [])


def doubts(path: Path, lines: Sequence[Record], place: Callable[[Record], Hashable]) -> list[str]:
    """Of any file that `MetricsLog` wrote. place: what tells its lines apart."""
    _, same, other = settle(lines, place)
    found = []
    if _cut_off(path):
        found.append(f"{path}: the last line is cut off, and left out: the run was killed, or is writing it just now")
    if same:
        found.append(f"{path} has {_these(same)} more than once, with the same values: each counts once")
    if other:
        found.append(
            f"{path} has {_these(other)} more than once, with different values: they are left out. Have two processes "
            "written it, or were two files joined? Remove the lines that are not this run's"
        )
    return found


def settle(lines: Sequence[Record], place: Callable[[Record], Hashable]) -> tuple[list[Record], list[int], list[int]]:
    """The lines of which each place has one; steps that had several of the same values, and of different ones.

    Of the same values the last line stays, of different ones none: neither is known to be the run's. What the clock or
    the machine decides may differ.
    """
    at: dict[Hashable, list[Record]] = {}
    for line in lines:
        at.setdefault(place(line), []).append(line)
    several = [group for group in at.values() if len(group) > 1]
    other = {id(group) for group in several if len({_unclocked(line) for line in group}) > 1}
    kept = [group[-1] for group in at.values() if id(group) not in other]
    steps = [
        sorted({group[0]["step"] for group in several if (id(group) in other) == which}) for which in (False, True)
    ]
    return kept, steps[0], steps[1]


def _place(record: Record) -> Hashable:
    return record["step"], tuple(task_names(record)) if is_evaluation(record) else None


def _unclocked(record: Record) -> str:
    return _dumps({key: value for key, value in sorted(record.items()) if not key.startswith(CLOCKED)})


def _these(steps: Sequence[int]) -> str:
    """Ascending step numbers in words: steps 3, 5-7."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    named = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:_NAMED]]
    more = f" and {len(runs) - _NAMED} more places" if runs[_NAMED:] else ""
    return f"{'step' if len(steps) == 1 else 'steps'} {', '.join(named)}{more}"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")


def _record(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _cut_off(path: Path) -> bool:
    last = _lines(path)[-1]
    return bool(last) and _record(last) is None


def read_records(path: Path) -> list[Record]:
    """Every line of a file that `MetricsLog` wrote, in order, but for a last one that was cut off.

    Raises:
        UserError: a line before the last is not a JSON object with a step.
    """
    lines = _lines(path)
    records = []
    for number, line in enumerate(lines, start=1):
        if record := _record(line):
            records.append(record)
        elif number < len(lines):
            raise UserError(
                f"{path} line {number} is not a metrics record (a JSON object with a step): remove that line"
            )
    return records


def _truncate(path: Path, keep_through: int) -> None:
    """Keeps the lines of steps <= keep_through. The file is replaced in one move: a kill leaves the old or the new."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(_dumps(record) + "\n" for record in read_records(path) if record["step"] <= keep_through)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _dumps(record: Record) -> str:
    # NaN and Infinity are written as Python's json does: a diverged loss must be seen, not hidden as null.
    return json.dumps(record, default=_plain)


def _plain(value: Any) -> Any:
    """Numpy and torch scalars and arrays as the Python values json knows."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{value!r} cannot be written to metrics.jsonl")


def total(records: list[Record], key: str) -> float:
    """The sum of a key over records; absent and null count as zero."""
    return sum(r.get(key) or 0 for r in records)
