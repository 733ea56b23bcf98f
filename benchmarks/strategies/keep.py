"""`prune-opd bench keep`: adds the comparison's finished runs to the repository's, after running what these lack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.common import BENCH, Out, environment
from benchmarks.strategies.command import FirstSeed, Jobs, Methods, Seeds, check
from benchmarks.strategies.kept import KEPT, Line, keep, read_kept, settings_digest
from benchmarks.strategies.plan import FIRST_SEED, RunSpec, Settings, choose, pair_recipe, plan
from benchmarks.strategies.rank import Wanted
from benchmarks.strategies.results import run_numbers
from benchmarks.strategies.runs import finished, run_all

LAST_ONLY = Settings(problems_between=8, evaluations=1)  # what is kept of a run has no curve

Pairs = Annotated[
    list[str] | None, typer.Argument(metavar="[PAIR …]", help="Recipes whose missing runs run first; none: no run.")
]


def run(
    pairs: Pairs = None,
    out: Out = BENCH,
    methods: Methods = None,
    seeds: Seeds = 5,
    first_seed: FirstSeed = FIRST_SEED,
    jobs: Jobs = 2,
) -> int:
    """Run what docs/strategies.jsonl lacks of the pairs from this kind of processor; keep what is finished. Returns 0.

    What is finished below DIR/strategies is kept too if a run fails or the command is stopped by Ctrl-C.
    Raises ConfigError or UserError before the first run for a pair or a method that cannot run.
    """
    folder, here = out / "strategies", processor()
    recipes = {pair: pair_recipe(pair) for pair in pairs or ()}
    specs = plan(recipes, choose(methods), range(first_seed, first_seed + seeds), LAST_ONLY)
    specs = missing(specs, read_kept(), here)
    if specs:
        check(specs, jobs)
    try:
        run_all(specs, folder, jobs, Console())
    finally:
        number = keep(KEPT, finished_lines(folder, here))
        print(f"{number} runs added to {KEPT}")
    return 0


def missing(specs: Sequence[RunSpec], kept: Sequence[Line], processor: str) -> list[RunSpec]:
    """The runs that no kept line of the processor has, and those whose windows a missing control replays."""
    known = {(line["pair"], line["method"], line["seed"], line["settings"], line["processor"]) for line in kept}

    def lacking(spec: RunSpec) -> bool:
        return (spec.pair, spec.method.name, spec.seed, settings_digest(spec.config), processor) not in known

    wanted = [spec for spec in specs if lacking(spec)]
    sources = {f"{spec.pair}/{spec.method.against}/{spec.seed}" for spec in wanted if spec.method.replays}
    return [spec for spec in specs if spec in wanted or spec.key in sources]


def processor() -> str:
    """Its name, and which of vLLM's kernels it has: they round differently, so a seed's rollouts are others."""
    wide = "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return f"{environment()['cpu']}, {'AVX-512' if wide else 'AVX2'}"


def finished_lines(folder: Path, processor: str) -> list[Line]:
    """The finished runs below `prune-opd bench strategies`' folder, but those of another size (`--quick`)."""
    lines = []
    for path in sorted(folder.glob("*/*/*/wanted.json")):
        wanted = Wanted.read(path.parent)
        records = finished(wanted, path.parent)
        pair, method, seed = path.parent.parts[-3:]
        if records is None or wanted.config.evaluation.problems != Settings.problems:
            continue
        run = run_numbers(*records)
        lines.append(
            {
                "pair": pair,
                "method": method,
                "seed": int(seed),
                "settings": settings_digest(wanted.config),
                "processor": processor,
                "accuracy": round(run["accuracy"], 5),
                "tokens_generated": round(run["tokens_generated"]),
                "cpu_s": {phase: round(seconds, 2) for phase, seconds in run["phases_cpu_s"].items()},
                "last_window": run["horizon"][-1],
                "overlap_at_start": round(run["overlap"][0], 4),
            }
        )
    return lines
