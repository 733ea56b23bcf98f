"""`prune-opd bench pair-check PAIR`: whether a tiny pair is an honest drift pair, or trap pair, in four tests.

PAIR is a recipe that distils a ledger pair (tiny_compatible, tiny_drift). The recipe runs once with full rollouts and
no gate; four models are measured on problems that no recipe was chosen on (measure.py): the teacher, and the
student before, after half of, and after that run.

    1  the teacher beats the student before the run, on the whole task at T = 1
    2  overlap on gold text is high at every position, for the student before the run
    3  overlap on the student's own rollouts decays with position, and to below that on gold text
    4  full OPD improves the student, and after half of it test 3 still holds: the later tokens were a waste

With `--kind trap` the third is turned round: on the student's own rollouts, in the last part, where no right solution
comes to, overlap is high and the KL a small share of that in the first part: teacher and student agree on a lost text.

A compatible pair is expected to fail the third. Exit code 1 if a test fails. Writes the JSON file and a PNG of curves.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from benchmarks.common import BENCH, Out, Quick, Report, measure, table
from benchmarks.studies.pair.command import refuse_other_teachers
from prune_opd.config import EvalConfig, ParallelConfig, TrainConfig
from prune_opd.config.recipe import load_recipe
from prune_opd.config.yaml import save_config
from prune_opd.errors import ConfigError, UserError
from prune_opd.ranks.launcher import start_ranks
from prune_opd.track.metrics import FILE_NAME, read_metrics, total


@dataclass(frozen=True)
class Limits:
    """Set before any pair was measured with this command."""

    errors_apart: float = 2.0  # accuracies differ if they are this many standard errors of their difference apart
    gold_overlap: float = 0.65  # least overlap on gold text, at every position
    gold_events: float = 0.05  # and most events per token there
    decay: float = 0.10  # least fall of overlap on own rollouts, first to last part, and distance from gold text there
    agreement: float = 0.90  # trap: least overlap on own rollouts in the last part
    quiet: float = 0.10  # trap: most KL there, as a share of that in the first part
    least_tokens: int = 200  # fewer in a part of the response, and its mean says nothing


LIMITS = Limits()
SEED = 30_000  # of the problems: neither a training run's nor an evaluation's
Result = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is measured. The defaults are the benchmark; QUICK only shows that it works."""

    problems: int = 256
    bins: int = 8
    steps: int | None = None  # None: the recipe's


QUICK = Settings(problems=8, steps=2)


@dataclass(frozen=True)
class Verdict:
    """One of the four tests: its numbers and whether they pass."""

    test: str
    passed: bool
    numbers: str


# ---------------------------------------------------------------------------------------------------- the tests


def verdicts(models: Mapping[str, Result], kind: str = "drift") -> list[Verdict]:
    """The four tests of this kind of pair on the measurements of teacher, before, half and after (measure.py)."""
    third, name = (decay, "decays") if kind == "drift" else (agreement, "stays high")
    teacher, before, half, after = (models[name] for name in ("teacher", "before", "half", "after"))
    gold, events = ([before["gold"][name][i] for i in _parts(before["gold"])] for name in ("overlap", "events"))
    holds, how = third(before)
    still, how_half = third(half)
    learnt = _above(after, before)
    return [
        Verdict("1 teacher beats student", _above(teacher, before), f"{_percent(teacher)} against {_percent(before)}"),
        Verdict(
            "2 overlap high on gold text",
            bool(gold) and min(gold) >= LIMITS.gold_overlap and max(events) <= LIMITS.gold_events,
            f"least {min(gold, default=math.nan):.2f}, most events {max(events, default=math.nan):.3f} a token",
        ),
        Verdict(f"3 overlap {name} on own rollouts", holds, how),
        Verdict(
            f"4 full OPD improves, {kind} at half time",
            learnt and still,
            f"{_percent(before)} to {_percent(after)}; at half time {how_half}",
        ),
    ]


def decay(model: Result) -> tuple[bool, str]:
    """Whether overlap on own rollouts falls enough from first to last part and ends as far below gold text there."""
    own, gold = model["own"], model["gold"]
    parts = [i for i in _parts(own) if gold["tokens"][i] >= LIMITS.least_tokens]
    if len(parts) < 2:
        return False, "too few tokens"
    first, last = own["overlap"][parts[0]], own["overlap"][parts[-1]]
    beside = gold["overlap"][parts[-1]]
    text = f"{first:.2f} to {last:.2f}, on gold text {beside:.2f} there"
    return min(first, beside) - last >= LIMITS.decay, text


def agreement(model: Result) -> tuple[bool, str]:
    """Whether both models agree on own rollouts in the last part: overlap high, KL low beside the first part's."""
    own = model["own"]
    parts = _parts(own)
    if len(parts) < 2:
        return False, "too few tokens"
    first, last = parts[0], parts[-1]
    overlap, before, kl = own["overlap"][last], own["kl"][first], own["kl"][last]
    return overlap >= LIMITS.agreement and kl <= LIMITS.quiet * before, (
        f"{overlap:.2f}, with a KL of {kl:.4f} nats, {before:.2f} at the beginning"
    )


def _parts(curves: Result) -> list[int]:
    return [i for i, tokens in enumerate(curves["tokens"]) if tokens >= LIMITS.least_tokens]


def _above(better: Result, worse: Result) -> bool:
    apart = better["accuracy"] - worse["accuracy"]
    return bool(apart > LIMITS.errors_apart * math.hypot(better["stderr"], worse["stderr"]))


def _percent(model: Result) -> str:
    return f"{model['accuracy']:.1%} ± {model['stderr']:.1%}"


# ---------------------------------------------------------------------------------------------------- running


Kind = Annotated[Literal["drift", "trap"], typer.Option(help="What the pair has to be.")]


def run(
    pair: Annotated[str, typer.Argument(metavar="PAIR")], out: Out = BENCH, quick: Quick = False, kind: Kind = "drift"
) -> int:
    """Run the pair's full OPD, measure, write the JSON file and a PNG beside it. 1 if a test fails."""
    settings = QUICK if quick else Settings()
    config = full_opd(pair, settings)
    report = Report(out / f"pair-check-{config.name}.json", quick, settings)
    with tempfile.TemporaryDirectory(prefix="prune-opd-") as name:
        folder = Path(name)
        save_config(config, folder / "recipe.yaml")
        save_config(replace(config, gate=None), folder / "full.yaml")
        _ranks("train", folder / "full.yaml", "--run-dir", folder / "run")
        half = folder / "run" / "checkpoints" / f"step_{config.checkpoint.every:06d}"
        _ranks("export", half, folder / "half")
        directories = {
            "teacher": config.teacher,
            "before": config.student,
            "half": folder / "half",
            "after": folder / "run" / "hf",
        }
        numbers = {"problems": settings.problems, "seed": SEED, "bins": settings.bins}
        models: dict[str, Result] = {}
        for model, directory in directories.items():
            with report.console.status(f"measuring: {model}"):
                request = {"recipe": str(folder / "recipe.yaml"), "model": str(directory), **numbers}
                (models[model],) = measure("benchmarks.studies.pair_check.measure", request, f"measuring {model}")
        steps, _ = read_metrics(folder / "run" / FILE_NAME)
    tests = verdicts(models, kind)
    totals = {"steps": len(steps), **{key: total(steps, key) for key in ("tokens_generated", "time_step")}}
    report.write(
        benchmark="pair-check",
        kind=kind,
        pair=config.name,
        gate=asdict(config.gate) if config.gate else None,
        max_len=config.horizon.max_len,
        thresholds=asdict(LIMITS),
        tests=[asdict(test) for test in tests],
        full_opd=totals,
        models=models,
    )
    picture = report.path.with_suffix(".png")
    picture.write_bytes(_chart(config, models))
    title = f"{config.name}: full OPD, {totals['steps']} steps, {totals['tokens_generated']:.0f} tokens"
    rows = [{**vars(test), "said": "pass" if test.passed else "FAIL"} for test in tests]
    report.console.print(table(title, {"test": "{test}", "": "{said}", "numbers": "{numbers}"}, rows, left=3))
    report.name_files(picture)
    return 0 if all(test.passed for test in tests) else 1


def full_opd(pair: str, settings: Settings) -> TrainConfig:
    """The pair's recipe with full rollouts on one rank, without evaluations and with a checkpoint at half time.

    Its gate is for measuring; the run leaves it out. ConfigError for a recipe that distils no ledger pair.
    """
    config = load_recipe(pair)
    if not isinstance(config, TrainConfig) or config.data.sources != ("ledger",) or config.gate is None:
        raise ConfigError(
            f"PAIR = {pair!r} is no recipe that distils a ledger pair with a gate: take tiny_compatible or tiny_drift; "
            "`prune-opd bench pair` measures any pair"
        )
    refuse_other_teachers(config)
    steps = settings.steps or config.steps
    half = max(1, steps // 2)
    return replace(
        config,
        steps=steps,
        horizon=replace(config.horizon, strategy="full"),
        evaluation=EvalConfig(problems=0),
        parallel=ParallelConfig(nproc=1, tensor=1, microbatch_tokens=config.parallel.microbatch_tokens),
        checkpoint=replace(config.checkpoint, every=half, keep=4, export_hf=True),
        track=replace(config.track, wandb="disabled"),
    )


def _ranks(*arguments: Any) -> None:
    """Run a worker command as one rank on one core. UserError if it fails; what it said is on the console."""
    command = ["-m", "prune_opd.cli.worker", *map(str, arguments)]
    if start_ranks(command, 1, {**os.environ, "OMP_NUM_THREADS": "1"}):
        raise UserError(f"{arguments[0]} of the pair's full OPD failed: its error is above")


# ---------------------------------------------------------------------------------------------------- showing


def _chart(config: TrainConfig, models: Mapping[str, Result]) -> bytes:
    from prune_opd.track.plotting import BLUE, GREEN, GREY, ORANGE, Chart, axes, legend, overview_png

    def draw(figure: Any, name: str) -> None:
        ax = axes(figure, "response tokens", name)
        lines = [("before", "gold", GREY), ("before", "own", BLUE), ("half", "own", ORANGE), ("after", "own", GREEN)]
        for model, text, colour in lines:
            curve = models[model][text]
            width = config.horizon.max_len / len(curve["tokens"])
            points = [((i + 0.5) * width, curve[name][i]) for i in range(len(curve["tokens"])) if curve["tokens"][i]]
            label = "gold text" if text == "gold" else f"own rollouts, {model}"
            ax.plot(*zip(*points, strict=True), color=colour, marker="o", label=label)
        ax.set_ylim(bottom=0)
        legend(ax, ncols=2)

    assert config.gate is not None
    charts = [
        Chart("Overlap by position", "", lambda figure: draw(figure, "overlap")),
        Chart("Drift events a token, by position", "", lambda figure: draw(figure, "events")),
    ]
    return overview_png(
        f"{config.name}: full OPD", f"top-{config.gate.k} of student and teacher; γ = {config.gate.threshold}", charts
    )
