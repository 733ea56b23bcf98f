"""`prune-opd bench pair STUDENT TEACHER --prompts FILE`: what a gate would see of any pair, and settings that fit it.

Before any training: student and teacher each answer the prompts at T = 1, and both read both texts. Takes two model
directories with --prompts, or a recipe, of which models, prompts and lengths are used and the layout (TP, PP …) is not;
then settings as a training run takes them (`data.suffix=…`, `gate.k=8`). Prompts are rendered as in training.

Both models are loaded with transformers in one process, in fp32, and a bf16 copy of one of them beside: all that must
fit the machine. docs/pair.md says how to read the tables. Writes DIR/pair.json.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.common import BENCH, Out, Quick, Report, measure, table
from benchmarks.studies.pair.rules import suggestions
from prune_opd.check.run import check_train
from prune_opd.config import (
    DataConfig,
    EvalConfig,
    GateConfig,
    HorizonConfig,
    ObjectiveConfig,
    ParallelConfig,
    RolloutConfig,
    TrainConfig,
)
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe
from prune_opd.config.teacher import EMA, STUDENT
from prune_opd.config.yaml import save_config
from prune_opd.errors import ConfigError

OVERRIDE = re.compile(r"[a-z_][a-z_0-9.]*=")
TEXTS = {"student": "the student's text", "teacher": "the teacher's text"}
AGREEMENT = {
    "": "{text}",
    "tokens": "{tokens}",
    "overlap": "{overlap:.3f}",
    "events": "{events:.1%}",
    "by position": "{curve}",
    "of the KL": "{events_of_kl:.0%}",
    "noise: of events": "{noise_of_events:.1%}",
    "of divergence": "{noise_of_divergence:.2%}",
}
DISTANCE = {
    "": "{text}",
    "reverse KL": "{reverse_kl:.3f}",
    "forward KL": "{forward_kl:.3f}",
    "KL > 1": "{large_kl:.0%}",
    "divergence": "{divergence:.3f}",
    "mass p": "{student_mass:.3f}",
    "q there": "{teacher_mass:.3f}",
    "acceptance": "{acceptance:.3f}",
    "entropy p": "{student_entropy:.2f}",
    "q": "{teacher_entropy:.2f}",
}
GATES = {
    "": "{text}",
    "gate": "{gate}",
    "events": "{events:.1%}",
    "precision": "{precision:.0%}",
    "recall": "{recall:.0%}",
    "responses": "{responses:.0%}",
    "half by": "{half_by}",
    "kept": "{kept:.0%}",
    "of the KL": "{kl_kept:.0%}",
}
FORMATS = {"": "{role}", "overlap": "{overlap:.4f}", "events": "{events:.2%}", "KL": "{kl:.5f}"}


@dataclass(frozen=True)
class Settings:
    """What is measured. QUICK only shows that it works."""

    rows: int = 32  # prompts; a file with fewer is read again
    max_len: int = 256  # most tokens of a response, where no recipe says it


QUICK = Settings(rows=4, max_len=32)


def run(
    pair: Annotated[
        list[str], typer.Argument(metavar="STUDENT TEACHER|RECIPE", help="Then settings, as dotted.key=value.")
    ],
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts as data.source. Default: the recipe's.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts.")] = Settings.rows,
    max_len: Annotated[
        int | None, typer.Option(min=1, metavar="L", help="Most tokens of a response.", show_default="recipe's, or 256")
    ] = None,
    k: Annotated[int | None, typer.Option("-k", "--k", min=1, help="Of both top-k.", show_default="recipe's")] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts' order and the sampling.")] = 0,
    out: Out = BENCH,
    quick: Quick = False,
) -> int:
    """Measure the pair, print the tables and the settings that fit, write the JSON file."""
    config = pair_config(pair, prompts, QUICK.max_len if quick else max_len, k, seed)
    settings = Settings(QUICK.rows if quick else rows, config.horizon.max_len)
    report, gate = Report(out / "pair.json", quick, settings), config.gate
    assert gate is not None
    with tempfile.TemporaryDirectory(prefix="prune-opd-") as folder:
        save_config(config, Path(folder) / "recipe.yaml")
        request = {"recipe": str(Path(folder) / "recipe.yaml"), "rows": settings.rows}
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        with report.console.status("measuring the pair (both models must fit this machine)"):
            (result,) = measure("benchmarks.studies.pair.measure", request, "measuring the pair", threads=threads)
    found = suggestions(result, gate.k, config.objective.k, gate.threshold)
    report.write(
        **{name: getattr(config, name) for name in ("student", "teacher", "seed")},
        sources=config.data.sources,
        k=gate.k,
        objective_k=config.objective.k,
        threshold=gate.threshold,
        **result,
        suggestions=[one._asdict() for one in found],
    )
    _print(result, config, report.console)
    report.console.print("\n[bold]settings that fit this pair[/]")
    for one in found:
        report.console.print(f"  {' '.join(one.overrides) or '—'}\n      {one.why}", markup=False, soft_wrap=True)
    report.name_files()
    return 0


def pair_config(words: list[str], prompts: Path | None, max_len: int | None, k: int | None, seed: int) -> TrainConfig:
    """The pair as a recipe for one process, checked. words: STUDENT TEACHER or RECIPE, and overrides.

    Raises:
        ConfigError: see the text.
    """
    names = [word for word in words if not OVERRIDE.match(word)]
    if len(names) == 1:
        recipe = load_recipe(names[0])
        if not isinstance(recipe, TrainConfig):
            raise ConfigError(f"RECIPE = {names[0]!r} distils nothing: name one with a student and a teacher")
        config = recipe
        if prompts is not None:
            config = replace(config, data=replace(config.data, source=str(prompts), mixture=(), weights=()))
    elif len(names) == 2:
        if prompts is None:
            raise ConfigError("--prompts is not set: give a file of prompts, or a recipe in place of the two models")
        horizon = HorizonConfig("full", max_len=Settings.max_len, min_len=1)
        student, teacher = names
        config = TrainConfig("pair", student, teacher, 1, horizon, data=DataConfig(source=str(prompts)))
    else:
        raise ConfigError(f"{len(names)} names ({', '.join(names)}): give STUDENT TEACHER, or one RECIPE")
    config = apply_overrides(config, [word for word in words if OVERRIDE.match(word)])
    refuse_other_teachers(config)
    config = _one_process(config, max_len, k, seed)
    if problems := check_train(config, 1, None, "never"):
        raise ConfigError("\n".join(problems))
    return config


def refuse_other_teachers(config: TrainConfig) -> None:
    """ConfigError for what a pair of models that read the same text does not have."""
    if config.teachers:
        raise ConfigError(
            f"teachers = {', '.join(config.teachers)}: a pair has one teacher; name a recipe with one, or give "
            "STUDENT TEACHER --prompts FILE to prune-opd bench pair"
        )
    if config.teacher in (STUDENT, EMA):
        raise ConfigError(
            f"teacher = {config.teacher}: the student is its own teacher, and one model is no pair; set teacher=DIR"
        )
    if config.data.teacher_prompt is not None:
        raise ConfigError(
            f"data.teacher_prompt = {config.data.teacher_prompt!r}: both models are measured on the same text, so the "
            "teacher would not have its hint; set data.teacher_prompt=null data.max_teacher_prompt_len=null"
        )


def _one_process(config: TrainConfig, max_len: int | None, k: int | None, seed: int) -> TrainConfig:
    """What the measurement needs of a recipe, and nothing of how it trains.

    A gate on something else than overlap leaves its constants, and γ is the paper's.
    """
    gate = config.gate or GateConfig()
    if gate.metric != "overlap":
        gate = replace(gate, metric="overlap", threshold=GateConfig.threshold)
    return TrainConfig(
        name=config.name,
        student=config.student,
        teacher=config.teacher,
        steps=config.steps,
        horizon=HorizonConfig("full", max_len=max_len or config.horizon.max_len, min_len=1),
        gate=replace(gate, k=k or gate.k),
        objective=ObjectiveConfig(k=k or config.objective.k),
        rollout=RolloutConfig(max_prompt_len=config.rollout.max_prompt_len),
        data=config.data,
        parallel=ParallelConfig(nproc=1, tensor=1),
        evaluation=EvalConfig(problems=0),
        seed=seed,
    )


# ---------------------------------------------------------------------------------------------------- printing


def _print(result: Mapping[str, Any], config: TrainConfig, console: Console) -> None:
    gate = config.gate
    assert gate is not None
    rows: list[dict[str, Any]] = []
    for role, text in TEXTS.items():
        found = result["texts"][role]
        curve = "/".join(f"{100 * events:.0f}" for events in found["by_position"]["events"] if events is not None)
        rows.append({"text": text, **found, "curve": f"{curve} %"})
    width = rows[0]["by_position"]["width"]
    title = f"agreement: events are overlap < {gate.threshold:g} at k = {gate.k}, by {width} positions"
    console.print(table(title, AGREEMENT, rows))
    console.print(
        table(f"distance, in nats; mass and divergence on the student's top {config.objective.k}", DISTANCE, rows)
    )
    gates = [{"text": row["text"] if not i else "", **gate} for row in rows for i, gate in enumerate(row["gates"])]
    console.print(
        table(
            "gates: precision and recall for KL > 1; responses with an event, and the token by which half have one",
            GATES,
            gates,
            left=2,
        )
    )
    formats = [{"role": role, **found} for role, found in result["bf16"].items()]
    console.print(table("bf16 against fp32, each model on its own text", FORMATS, formats))
    console.print(
        f"γ of this pair: {result['gamma']:g} (at most 5 % of the first {gate.early_tokens} tokens are below it)"
    )
