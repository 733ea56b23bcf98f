"""`prune-opd bench judge MODEL …`: students against their teacher over the whole vocabulary, by transformers alone.

An outside judge: nothing of the training code is used. Every model answers held-out prompts at T = 1, and the teacher
answers them once. Along both texts, at every response token, in nats:

    reverse KL    sum over the vocabulary of p (log p - log q), p of the student and q of the teacher
    forward KL    the same with the two exchanged
    entropies     of student and teacher
    top-16 mass   what the student gives to its 16 likeliest tokens, and what the teacher gives to them
    NLL           -log p of the text

In the tables q is the teacher. A mean is over tokens; its ± is the standard error over prompts. The models are Hugging
Face directories, for example RUN/hf or an export. Without --teacher and --prompts it takes those of the real pair
(`make real-pair`). Writes DIR/judge.json.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import BENCH, Out, Quick, Report, measure, table
from prune_opd.config.paths import real_pair_dir
from prune_opd.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """What is measured. The defaults are the benchmark; QUICK only shows that it works."""

    prompts: int = 24  # of all files together, the first of each file
    tokens: int = 48  # at most, of a response
    greedy: int = 3  # prompts whose greedy answers are kept as text
    batch: int = 8  # rows that go through a model at a time
    seed: int = 1234  # of the responses


QUICK = Settings(prompts=4, tokens=8, greedy=2)
TABLES = {
    "own": "the model's own text",
    "given": "the teacher's text",
}
COLUMNS = {
    "model": "{name}",
    "rev. KL": "{reverse_kl:.3f}",
    "±": "{reverse_kl_stderr:.3f}",
    "fwd. KL": "{forward_kl:.3f}",
    "± ": "{forward_kl_stderr:.3f}",
    "entropy": "{student_entropy:.2f}",
    "q's": "{teacher_entropy:.2f}",
    "top-16": "{student_top_mass:.3f}",
    "q's there": "{teacher_mass_there:.3f}",
    "NLL": "{nll:.2f}",
    "tokens": "{tokens}",
}


def run(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL …", help="Model directories.")],
    teacher: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: the real pair's.")] = None,
    prompts: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Repeatable: .jsonl prompt files.")] = None,
    rows: Annotated[int, typer.Option("--rows", metavar="N", help="Prompts of all files together.")] = Settings.prompts,
    tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens of a response.")] = Settings.tokens,
    threads: Annotated[int, typer.Option(metavar="N", help="Cores.")] = 1,
    out: Out = BENCH,
    quick: Quick = False,
) -> int:
    """Measure the models one after another, print two tables and greedy answers, write the JSON file."""
    pair = real_pair_dir()
    settings = QUICK if quick else replace(Settings(), prompts=rows, tokens=tokens)
    teacher = teacher or pair / "teacher"
    files = prompts or [pair / "data" / f"{name}_held_out.jsonl" for name in ("chat", "arithmetic")]
    for directory in (teacher, *models):
        if not (directory / "config.json").is_file():
            hint = ": run make real-pair" if pair in directory.parents else ""
            raise ConfigError(f"{directory} is no model directory, it has no config.json{hint}")
    for file in files:
        if not file.is_file():
            raise ConfigError(f"there is no prompt file {file}{': run make real-pair' if pair in file.parents else ''}")
    report = Report(out / "judge.json", quick, settings)
    request = {
        "models": [str(model) for model in models],
        "teacher": str(teacher),
        "files": [str(file) for file in files],
        **asdict(settings),
    }
    with report.console.status(f"judging {len(models)} models"):
        (result,) = measure("benchmarks.studies.judge.measure", request, "judging", threads=threads)
    report.write(teacher=str(teacher), files=request["files"], **result)
    found: list[dict[str, Any]] = [{**row, "name": _short(row["model"])} for row in result["models"]]
    size = f"{result['prompts']} prompts, at most {settings.tokens} tokens, T = 1"
    for text, title in TABLES.items():
        lines = [{"name": row["name"], **row[text]} for row in found]
        report.console.print(table(f"{title}: {size}", COLUMNS, lines))
    for row in found:
        report.console.print(f"[bold]{row['name']}[/], greedy")
        for sample in row["greedy"]:
            report.console.print(f"  {sample['prompt']!r}\n    → {sample['response']!r}", markup=False, highlight=False)
    report.name_files()
    return 0


def _short(model: str) -> str:
    return "/".join(Path(model).parts[-2:])
