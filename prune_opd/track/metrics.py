"""`metrics.jsonl`: what a run measures, one JSON object a line, and what its totals say.

The file is the record of a run: console, wandb and report only show what is in it. A *step record* (steps 1..N) is
written after each optimizer step; an *evaluation line* carries the `eval_*` keys under the number of steps finished by
then, so the evaluation before training has step 0. `meanings` says what each key means.
"""

from __future__ import annotations

import functools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prune_opd.errors import UserError

Record = dict[str, Any]

FILE_NAME = "metrics.jsonl"

PHASES: dict[str, str] = {
    "time_sync": "weight sync",
    "time_rollout": "rollout",
    "time_teacher": "teacher",
    "time_train": "train",
}
"""The timed phases of a step, in the order in which they run; the rest of `time_step` is "other"."""

_EVAL_PREFIX, _STDERR_SUFFIX = "eval_", "_stderr"
_EVAL_SUFFIXES = (_STDERR_SUFFIX, "_low", "_high", "_pass", "_readable", "_answers")


@functools.cache
def meanings() -> dict[str, str]:
    """Every key of metrics.jsonl with meaning and unit; `<task>` and `<id>` stand for a task's name and a token id."""
    text = (Path(__file__).parent / "assets" / "metrics.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def meaning(key: str) -> str | None:
    """The meaning of a key as it is written, None if there is none: `eval_ledger` is `eval_<task>`, `end_share_2`
    is `end_share_<id>`."""
    pattern = re.sub(rf"^eval_(.+?)({'|'.join(_EVAL_SUFFIXES)})?$", r"eval_<task>\2", key)
    pattern = re.sub(r"^(end_mass_student|end_mass_teacher|end_share)_\d+$", r"\1_<id>", pattern)
    return meanings().get(key) or meanings().get(pattern)


def is_evaluation(record: Record) -> bool:
    """Whether a line is an evaluation's (it has `eval_*` keys) and not a step's."""
    return any(key.startswith(_EVAL_PREFIX) for key in record)


def task_names(evaluation: Record) -> list[str]:
    """The tasks an evaluation line has an accuracy for, in its order; one may be called `math_high`."""
    further = {f"{key}{suffix}" for key in evaluation for suffix in _EVAL_SUFFIXES} | {"eval_response_length"}
    return [key.removeprefix(_EVAL_PREFIX) for key in evaluation if key.startswith(_EVAL_PREFIX) and key not in further]


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
    """The step records and the evaluation lines of a metrics file, each in order of writing.

    A last line that was cut off (the run was killed while it wrote) is left out. Where a step was written twice the
    later values count.

    Raises:
        UserError: there is no such file, or a line before the last is not a JSON object with a step.
    """
    if path.parent.is_file():
        raise UserError(f"{path.parent} is a file: give the directory of its run, {path.parent.parent}")
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a run directory whose training has logged at least one step")
    steps: dict[int, Record] = {}
    evaluations: dict[int, Record] = {}
    for record in read_records(path):
        kind = evaluations if is_evaluation(record) else steps
        kind[record["step"]] = kind.get(record["step"], {}) | record
    return list(steps.values()), list(evaluations.values())


def read_records(path: Path) -> list[Record]:
    """Every line of a file that `MetricsLog` wrote, in order, but for a last one that was cut off.

    Raises:
        UserError: a line before the last is not a JSON object with a step.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
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


# ------------------------------------------------------------------------------------------------------- totals


@dataclass(frozen=True)
class Accuracy:
    """First and last accuracy of a task (0..1) and the steps they were taken at; one alone has no `after`."""

    task: str
    first_step: int
    before: float
    before_stderr: float | None
    last_step: int
    after: float | None
    after_stderr: float | None
    readable_before: tuple[int, int] | None = None  # answers that could be read, all answers
    readable_after: tuple[int, int] | None = None


@dataclass(frozen=True)
class Summary:
    """A run's totals. Lengths in tokens, times in seconds; None where the run did not measure it."""

    steps: int
    final_horizon: int | None
    accuracy: list[Accuracy]
    tokens_generated: int
    tokens_full: int | None  # estimate, over the steps that have one
    saved: float | None  # 1 - generated / full over those steps: an estimate, below zero if nothing was saved
    stopped: int  # responses that the in-flight gate stopped
    tokens_avoided: int  # estimate: what those would still have cost
    teacher_tokens_inflight: int
    full_kl: tuple[float, float] | None  # reverse KL over the vocabulary, of the first step and of the last
    padding: tuple[float, float] | None  # mean share of padding: rows padded to the longest, and packed
    seconds: float
    phases: dict[str, float]  # label -> seconds: the phases, other, evaluation; those that took no time are left out


def summarise(steps: list[Record], evaluations: list[Record]) -> Summary:
    """Adds a run up. Either list may be empty."""
    estimated = [r for r in steps if r.get("tokens_full")]
    full = sum(r["tokens_full"] for r in estimated)
    kls = [kl for kl in map(full_kl, steps) if kl is not None]
    phases = {label: total(steps, key) for key, label in PHASES.items()}
    phases["other"] = max(0.0, total(steps, "time_step") - sum(phases.values()))
    phases["evaluation"] = total(evaluations, "time_eval")
    return Summary(
        steps=max((r["step"] for r in steps), default=0),
        final_horizon=next((r["horizon"] for r in reversed(steps) if r.get("horizon") is not None), None),
        accuracy=_accuracies(evaluations),
        tokens_generated=int(total(steps, "tokens_generated")),
        tokens_full=round(full) if estimated else None,
        saved=1 - total(estimated, "tokens_generated") / full if estimated else None,
        stopped=int(total(steps, "pruned_inflight")),
        tokens_avoided=round(total(steps, "tokens_avoided")),
        teacher_tokens_inflight=int(total(steps, "teacher_tokens_inflight")),
        full_kl=(kls[0], kls[-1]) if kls else None,
        padding=_padding(steps),
        seconds=sum(phases.values()),
        phases={label: seconds for label, seconds in phases.items() if seconds > 0},
    )


def total(records: list[Record], key: str) -> float:
    """The sum of a key over records; absent and null count as zero."""
    return sum(r.get(key) or 0 for r in records)


def _padding(steps: list[Record]) -> tuple[float, float] | None:
    keys = ("padding_waste_padded", "padding_waste_packed")
    known = [r for r in steps if all(r.get(key) is not None for key in keys)]
    if not known:
        return None
    padded, packed = (total(known, key) / len(known) for key in keys)
    return padded, packed


def _accuracies(evaluations: list[Record]) -> list[Accuracy]:
    found = []
    for task in dict.fromkeys(name for line in evaluations for name in task_names(line)):
        key = _EVAL_PREFIX + task
        lines = [line for line in evaluations if line.get(key) is not None]
        if not lines:
            continue
        first, last = lines[0], lines[-1]
        again = last if len(lines) > 1 else {}
        found.append(
            Accuracy(
                task=task,
                first_step=first["step"],
                before=first[key],
                before_stderr=first.get(key + _STDERR_SUFFIX),
                last_step=last["step"],
                after=again.get(key),
                after_stderr=again.get(key + _STDERR_SUFFIX),
                readable_before=readable(first, f"{key}_"),
                readable_after=readable(again, f"{key}_"),
            )
        )
    return found
