"""`prune-opd bench strategies`: the papers' comparison on the tiny pairs, every method from the same start.

plan.py      the methods, as changes of full OPD, and the order of the runs
runs.py      one process a run (rank.py), resumable; judged.py: a pair without problems
results.py   the rows of the tables, and whether the targets were reached
kept.py      the runs that the repository keeps, and the table of docs/comparison.md; keep.py adds to them
charts.py    accuracy against cost, dynamics, sweeps
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from benchmarks.common import BENCH, Out, Quick, Report
from benchmarks.strategies.judged import held_out
from benchmarks.strategies.plan import (
    FIRST_SEED,
    METHODS,
    RIVALS,
    TABLE,
    RunSpec,
    Settings,
    choose,
    pair_recipe,
    plan,
    sweep_plan,
)
from benchmarks.strategies.results import in_points, markdown, pair_rows, sweep_rows, verdicts
from benchmarks.strategies.runs import run_all
from prune_opd.check.run import check_train
from prune_opd.errors import ConfigError, UserError

PAIRS = ("tiny_compatible", "tiny_drift")
QUICK = Settings(problems=8, problems_between=4, evaluations=1, overrides=("steps=2", "rollout.prompts=4"))
QUICK_METHODS = ["full", "prune", "random"]

Pairs = Annotated[list[str] | None, typer.Argument(metavar="[PAIR …]", help=f"Recipes; {' and '.join(PAIRS)} if none.")]
Seeds = Annotated[int, typer.Option(min=1, help="Runs of every method on every pair.")]
NAMES = ", ".join([*(method.name for method in METHODS), RIVALS, TABLE])
FirstSeed = Annotated[
    int, typer.Option(min=FIRST_SEED, help="Where they begin: a machine takes up seeds that no kept run has.")
]
Methods = Annotated[list[str] | None, typer.Option(metavar="NAME", help=f"Again for more; one of {NAMES}.")]
Set = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Of the recipe, before a method changes it.")]
Jobs = Annotated[int, typer.Option(min=1, help="Runs side by side, one core each.")]
SweepSeeds = Annotated[int, typer.Option(min=0, help="Runs of every point of the γ and k sweeps, on the last pair.")]


def run(
    pairs: Pairs = None,
    out: Out = BENCH,
    quick: Quick = False,
    seeds: Seeds = 3,
    first_seed: FirstSeed = FIRST_SEED,
    methods: Methods = None,
    jobs: Jobs = 2,
    set: Set = None,
    sweep_seeds: SweepSeeds = 1,
) -> int:
    """Run what is not there yet in DIR/strategies; write JSON, HTML, PNGs and markdown. Returns 0.

    Raises ConfigError or UserError before the first run for a pair or a method that cannot run.
    """
    settings = QUICK if quick else Settings()
    recipes = {pair: pair_recipe(pair, [*settings.overrides, *(set or ())]) for pair in dict.fromkeys(pairs or PAIRS)}
    chosen = choose(QUICK_METHODS if quick and not methods else methods)
    numbers = [first_seed + i for i in range(1 if quick else seeds)]
    specs = plan(recipes, chosen, numbers, settings)
    swept_pair = list(recipes)[-1]
    swept_seeds = [] if quick or "prune" not in {method.name for method in chosen} else numbers[:sweep_seeds]
    specs += sweep_plan(swept_pair, recipes[swept_pair], swept_seeds, settings)
    path, folder = out / "strategies.json", out / "strategies"
    check(specs, jobs)

    began, report = time.time(), Report(path, quick, settings)
    results = run_all(specs, folder, jobs, report.console)
    found: dict[str, Any] = {}
    for pair, recipe in recipes.items():
        rows = pair_rows(pair, chosen, results)
        judged = [] if quick else verdicts(pair, recipe.horizon.max_len, rows)
        found[pair] = {
            "max_len": recipe.horizon.max_len,
            "steps": recipe.steps,
            "rows": rows,
            "verdicts": [{**asdict(verdict), "text": str(verdict)} for verdict in judged],
        }
        text = markdown(pair, rows, judged, notes(found[pair], numbers, settings))
        (folder / f"{pair}.md").write_text(text, encoding="utf-8")
        report.console.print(text, markup=False, highlight=False, soft_wrap=True)
    swept = sweep_rows(swept_pair, recipes[swept_pair], swept_seeds, results)
    report.write(
        seeds=numbers,
        jobs=jobs,
        seconds=time.time() - began,
        pairs=found,
        sweeps={"pair": swept_pair, "seeds": swept_seeds, "rows": swept},
    )
    from benchmarks.strategies.charts import write_charts  # matplotlib: only now

    report.name_files(write_charts(path))
    return 0


def check(specs: Sequence[RunSpec], jobs: int) -> None:
    """ConfigError for more jobs than cores, UserError with what `check` says of runs that cannot run."""
    if jobs > len(os.sched_getaffinity(0)):
        raise ConfigError(f"--jobs {jobs} is more than this process has cores ({len(os.sched_getaffinity(0))})")
    problems = {line for spec in specs for line in check_train(spec.config, 1, None, "never")}
    for config in {spec.pair: spec.config for spec in specs}.values():
        if not config.evaluation.problems:
            held_out(config)
    if problems:
        raise UserError("\n".join(sorted(problems)))


def notes(pair: dict[str, Any], seeds: list[int], settings: Settings) -> list[str]:
    """What a reader of a table must know."""
    lines = [
        f"{len(seeds)} seeds, {pair['steps']} steps, one rank on one core a run; accuracy on {settings.problems} fresh "
        "problems a seed at T = 1, mean ± standard error over the seeds; tokens are response tokens, seconds CPU (wall "
        "clock) of the whole training; saved: against full OPD of the same seed, seconds = rollout + teacher + train.",
        f"Before: {pair['rows'][0]['accuracy_before']:.1%} on the first {settings.problems_between}.",
    ]
    lines += [
        f"{row['title']}: {in_points(row['gaps'][other])} points to {other} (same seeds)."
        for row in pair["rows"]
        for other in row["gaps"]
        if other != "full"
    ]
    return lines
