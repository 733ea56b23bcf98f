"""A run of a pair whose recipe has no problems to answer, the real pair's, is judged by transformers alone.

The judge is that of `prune-opd bench judge`: the full reverse KL to the teacher along the student's own text and along
the teacher's, on held-out prompts. What stands for the accuracy is the share of it that the training has closed, the
mean over both texts: the student's own may become easy, the teacher's stays what it is.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.studies.judge.command import Settings
from prune_opd.config import TrainConfig
from prune_opd.errors import ConfigError
from prune_opd.track.metrics import Record

FILE_NAME = "judged.json"
TEXTS = ("own", "given")
KEPT = ("reverse_kl", "reverse_kl_stderr", "student_entropy", "teacher_entropy")


def held_out(config: TrainConfig) -> list[Path]:
    """NAME_held_out.jsonl beside each source NAME_train.jsonl. ConfigError for a source that has none."""
    sources = [Path(source) for source in config.data.sources]
    files = [source.with_name(source.name.replace("_train.jsonl", "_held_out.jsonl")) for source in sources]
    for source, file in zip(sources, files, strict=True):
        if file == source or not file.is_file():
            raise ConfigError(
                f"evaluation.problems = 0 in the recipe {config.name!r}: its students are judged by held-out prompts, "
                f"NAME_held_out.jsonl beside NAME_train.jsonl, and {source} has none; put the file there, or set "
                "evaluation.problems"
            )
    return files


def judge(config: TrainConfig, folder: Path) -> None:
    """Compare the students before and after the run in `folder`, leave the numbers, and remove the exported one."""
    from benchmarks.studies.judge.measure import measure  # torch: only now

    settings = replace(Settings(), tokens=min(Settings.tokens, config.horizon.max_len), greedy=1)
    found = measure(
        models=[str(config.student), str(folder / "hf")],
        teacher=str(config.teacher),
        files=[str(file) for file in held_out(config)],
        **asdict(settings),
    )
    before, after = ({text: row[text] for text in TEXTS} for row in found["models"])
    part = folder / f"{FILE_NAME}.part"
    part.write_text(json.dumps({"before": before, "after": after}), encoding="utf-8")
    part.rename(folder / FILE_NAME)
    shutil.rmtree(folder / "hf")


def read_judged(folder: Path) -> dict[str, Any] | None:
    """What `judge` left: {before, after} → {own, given} → numbers; None where it left nothing."""
    path = folder / FILE_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def kept_numbers(judged: dict[str, Any]) -> dict[str, Any]:
    """The same with the numbers of `KEPT` alone, rounded."""
    return {
        when: {text: {key: round(numbers[key], 4) for key in KEPT} for text, numbers in texts.items()}
        for when, texts in judged.items()
    }


def judged_evaluations(config: TrainConfig, folder: Path) -> list[Record]:
    """The judge's numbers as evaluations at the start and at the end of a run; none where it has not judged yet."""
    judged = read_judged(folder)
    if judged is None:
        return []
    before, after = judged["before"], judged["after"]
    left = [after[text]["reverse_kl"] / before[text]["reverse_kl"] for text in TEXTS]
    errors = [after[text]["reverse_kl_stderr"] / before[text]["reverse_kl"] for text in TEXTS]
    error = math.hypot(*errors) / len(errors)  # of the prompts
    return [
        {"step": 0, "eval_closed": 0.0, "eval_closed_stderr": 0.0},
        {"step": config.steps, "eval_closed": 1 - fmean(left), "eval_closed_stderr": error},
    ]
