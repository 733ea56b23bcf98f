"""`prune-opd bench fp8-noise`: overlap and drift events that FP8 alone makes, between a model and itself.

The gate takes a low overlap for drift. A model in FP8 does not have the top-k of the same model in bf16, so with
student = teacher some tokens are events all the same; a threshold γ is of use only where these are rare. fp8_measure.py
measures, in a process of its own, with emulated FP8 (fp8_emulation.py); this side makes the tables, without torch.

Two models. The tiny teacher on its own rollouts of the ledger task: real text, but 128 wide and 199 ids. And a larger
one with random weights on random tokens: its logits are Gaussian, with a tail far denser than a trained model's, and
without the outlying activations that trained ones have; it says how noise grows with the number of ids and layers,
and is no model of a real pair.

The rule for a recommended γ: the largest of those tried whose event rate against bf16 is at most 1 in 1000 tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

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
    random: tuple[int, int, int] = (512, 8, 32_768)  # hidden, layers, ids
    tokens: int = 2048  # of the random model
    microbatch: int = 2048
    threads: int = 1


QUICK = Settings(problems=0, random=(128, 4, 512), tokens=256, microbatch=128)


def run(path: Path, quick: bool) -> int:
    """Measure, write the JSON file, print the tables. UserError if the tiny teacher is not there."""
    settings = QUICK if quick else Settings()
    models = {}
    if settings.problems:
        teacher = Path(tiny_model(load_recipe(TEACHER_RECIPE)))  # type: ignore[arg-type]  # an SftConfig
        if not (teacher / "model.safetensors").is_file():
            raise UserError(f"the tiny teacher is not there ({teacher}): run `make tiny-models`")
        rollouts = ["--problems", str(settings.problems), "--max-len", str(settings.max_len)]
        models["tiny teacher, own rollouts"] = ["--model", str(teacher), *rollouts]
    numbers = ",".join(map(str, settings.random))
    models["random weights, random tokens"] = ["--random", numbers, "--tokens", str(settings.tokens)]
    path.parent.mkdir(parents=True, exist_ok=True)
    console = Console()
    results = {}
    for name, options in models.items():
        with console.status(f"measuring: {name}"):
            results[name] = _measure(name, options, settings)
        results[name]["recommended"] = _recommended(results[name]["pairs"])
    answer = {"benchmark": "fp8-noise", "quick": quick, "settings": asdict(settings), "rule": RARE, "models": results}
    path.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    for name, result in results.items():
        _print(name, result, console)
    console.print(f"[bold]{path}[/]", soft_wrap=True)
    return 0


def _measure(name: str, options: list[str], settings: Settings) -> dict[str, Any]:
    env = {**os.environ, "OMP_NUM_THREADS": str(settings.threads)}
    with tempfile.TemporaryDirectory(prefix="prune-opd-") as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.studies.fp8_noise.measure", *options]
        command += ["--microbatch", str(settings.microbatch), "--json", str(answer)]
        process = subprocess.run(command, env=env, capture_output=True, text=True)
        if process.returncode != 0:
            last = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise UserError(f"{name} failed: {last}")
        result: dict[str, Any] = json.loads(answer.read_text())
        return result


def _recommended(pairs: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """By number format and k, where the other side is bf16: the largest γ whose events are rare; None: none is."""
    return {
        pair["student"]: {str(row["k"]): _largest(row["event_rate"]) for row in pair["by_k"]}
        for pair in pairs
        if pair["teacher"] == "bf16"
    }


def _largest(event_rate: dict[str, float]) -> float | None:
    return max((float(threshold) for threshold, rate in event_rate.items() if rate <= RARE), default=None)


# ---------------------------------------------------------------------------------------------------- printing


def _print(name: str, result: dict[str, Any], console: Console) -> None:
    shape = ", ".join(f"{value} {key}" for key, value in result["shape"].items())
    console.print(f"\n[bold]{name}[/]: {shape}; {result['tokens']} tokens; torch {result['torch']}")
    errors = ", ".join(f"{key} {value:.2%}" for key, value in result["hidden_error"].items() if key != "bf16")
    console.print(f"error of the last hidden states, relative to bf16: {errors}", soft_wrap=True)
    thresholds = list(result["pairs"][0]["by_k"][0]["event_rate"])
    table = Table(title="events per token, and tokens until 100 events (reliability 0 at w_drop = .01)")
    for column in ("student", "teacher", "k", "overlap", "1 %", "5 %", *(f"γ = {t}" for t in thresholds)):
        table.add_column(column, justify="left" if column in ("student", "teacher") else "right")
    for pair in result["pairs"]:
        for row in pair["by_k"]:
            rates = [_rate(row["event_rate"][t], row["tokens_to_zero"][t]) for t in thresholds]
            numbers = [f"{row[column]:.3f}" for column in ("overlap", "overlap_q01", "overlap_q05")]
            first = row is pair["by_k"][0]
            names = (pair["student"], pair["teacher"]) if first else ("", "")
            table.add_row(*names, str(row["k"]), *numbers, *rates, end_section=row is pair["by_k"][-1])
    console.print(table)
    ks = [str(row["k"]) for row in result["pairs"][0]["by_k"]]
    table = Table(title=f"largest γ with at most {RARE:.1%} events against bf16")
    for column in ("", *(f"k = {k}" for k in ks)):
        table.add_column(column, justify="right" if column else "left")
    for recipe, by_k in result["recommended"].items():
        table.add_row(recipe, *("none" if by_k[k] is None else f"{by_k[k]:g}" for k in ks))
    console.print(table)


def _rate(rate: float, tokens: float | None) -> str:
    return "0" if tokens is None else f"{rate:.2%} ({tokens:,.0f})"
