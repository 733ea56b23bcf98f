"""`prune-opd bench fp8-noise`: overlap and drift events that FP8 alone makes between a model and itself.

The gate takes a low overlap for drift. A model in FP8 does not have the top-k of the same model in bf16, so some tokens
are events even where student and teacher are the same model; a threshold γ is of use only where these are rare.
measure.py measures with emulated FP8 (emulation.py), in a process of its own. No torch on this side.

Two models. The tiny teacher reads its own rollouts of the ledger task: real text, but the model is 128 wide and has 199
vocabulary entries. A larger model with random weights reads random tokens: its logits are Gaussian, with a tail far
denser than a trained model's and without the outlying activations that trained ones have. It says how noise grows with
the vocabulary and the number of layers, and is no model of a real pair.

The rule for a recommended γ: the largest of those tried whose event rate against bf16 is at most 1 in 1000 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common import BENCH, Out, Quick, Report, measure, table
from prune_opd.config.paths import tiny_model
from prune_opd.config.recipe import load_recipe
from prune_opd.errors import UserError

RARE = 1e-3  # events per token
TEACHER_RECIPE = "tiny_teacher"


@dataclass(frozen=True)
class Settings:
    """What is measured. The defaults are the benchmark; QUICK only shows that it works: random models, few tokens."""

    problems: int = 160  # of the tiny teacher; 0: leave it out
    max_len: int = 216
    random: tuple[int, int, int] = (512, 8, 32_768)  # hidden, layers, vocabulary
    tokens: int = 2048  # of the random model
    microbatch: int = 2048


QUICK = Settings(problems=0, random=(128, 4, 512), tokens=256, microbatch=128)


def run(out: Out = BENCH, quick: Quick = False) -> int:
    """Measure, write the JSON file, print the tables. UserError if the tiny teacher is not there."""
    settings = QUICK if quick else Settings()
    requests: dict[str, dict[str, Any]] = {}
    if settings.problems:
        teacher = Path(tiny_model(load_recipe(TEACHER_RECIPE)))  # type: ignore[arg-type]  # an SftConfig
        if not (teacher / "model.safetensors").is_file():
            raise UserError(f"the tiny teacher is not there ({teacher}): run `make tiny-models`")
        own = {"model": str(teacher), "problems": settings.problems, "max_len": settings.max_len}
        requests["tiny teacher, own rollouts"] = own
    requests["random weights, random tokens"] = {"random": settings.random, "tokens": settings.tokens}
    report = Report(out / "fp8-noise.json", quick, settings)
    models = {}
    for name, request in requests.items():
        with report.console.status(f"measuring: {name}"):
            (found,) = measure(
                "benchmarks.studies.fp8_noise.measure", request | {"microbatch": settings.microbatch}, name
            )
        models[name] = {**found, "recommended": _recommended(found["pairs"])}
    report.write(rule=RARE, models=models)
    for name, result in models.items():
        _print(name, result, report.console)
    report.name_files()
    return 0


def _recommended(pairs: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """The largest γ whose events against bf16 are rare, by number format and k; None where there is no such γ."""
    return {
        pair["student"]: {
            str(row["k"]): max((float(t) for t, rate in row["event_rate"].items() if rate <= RARE), default=None)
            for row in pair["by_k"]
        }
        for pair in pairs
        if pair["teacher"] == "bf16"
    }


# ---------------------------------------------------------------------------------------------------- printing


def _print(name: str, result: dict[str, Any], console: Console) -> None:
    shape = ", ".join(f"{value} {key}" for key, value in result["shape"].items())
    console.print(f"\n[bold]{name}[/]: {shape}; {result['tokens']} tokens; torch {result['torch']}")
    errors = ", ".join(f"{key} {value:.2%}" for key, value in result["hidden_error"].items() if key != "bf16")
    console.print(f"error of the last hidden states, relative to bf16: {errors}", soft_wrap=True)
    thresholds = list(result["pairs"][0]["by_k"][0]["event_rate"])
    columns = {"student": "{student}", "teacher": "{teacher}", "k": "{k}", "overlap": "{overlap:.3f}"}
    columns |= {f"γ = {threshold}": f"{{event_rate[{threshold}]:.2%}}" for threshold in thresholds}
    rows = [{**pair, **row} for pair in result["pairs"] for row in pair["by_k"]]
    console.print(table("overlap, and events per token", columns, rows, left=2))
    ks = [row["k"] for row in result["pairs"][0]["by_k"]]
    rows = [
        {"recipe": recipe} | {f"k{k}": "none" if by_k[str(k)] is None else f"{by_k[str(k)]:g}" for k in ks}
        for recipe, by_k in result["recommended"].items()
    ]
    title = f"largest γ with at most {RARE:.1%} events against bf16"
    console.print(table(title, {"": "{recipe}"} | {f"k = {k}": f"{{k{k}}}" for k in ks}, rows))
