"""`prune-opd bench keep`: adds the comparison's finished runs to the repository's, after running what these lack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.common import BENCH, Out, environment
from benchmarks.strategies.command import FirstSeed, Jobs, Methods, Seeds, check
from benchmarks.strategies.judged import kept_numbers, read_judged
from benchmarks.strategies.kept import EVERY, KEPT, RUN, Line, identity, keep, read_kept, settings_digest, valid
from benchmarks.strategies.plan import FIRST_SEED, TABLE, RunSpec, Settings, choose, pair_recipe, plan
from benchmarks.strategies.rank import Wanted
from benchmarks.strategies.results import run_numbers
from benchmarks.strategies.runs import finished, run_all
from prune_opd.config import TrainConfig
from prune_opd.config.paths import shipped_models_dir

SIZE = Settings(problems_between=64)  # what is between the start and the end only draws curves

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
    """Run what docs/strategies.jsonl lacks of the pairs (`missing`); keep what is finished. Returns 0.

    Without --methods: the table's.
    Writes DIR/kept.html: tables and curves of all that is kept. What is finished below DIR/strategies is kept too if a
    run fails or the command is stopped by Ctrl-C.
    Raises ConfigError or UserError before the first run for a pair or a method that cannot run.
    """
    folder, here = out / "strategies", processor()
    recipes = {pair: pair_recipe(pair, SIZE.overrides) for pair in pairs or ()}
    specs = plan(recipes, choose(methods or [TABLE]), range(first_seed, first_seed + seeds), SIZE)
    specs = missing(specs, read_kept(), here)
    if specs:
        check(specs, jobs)
    try:
        run_all(specs, folder, jobs, Console())
    finally:
        number = keep(KEPT, valid(finished_lines(folder, here)))
        print(f"{number} runs added to {KEPT}")
    from benchmarks.strategies.kept_page import write_kept_page  # matplotlib: only now

    write_kept_page(valid(read_kept()), out / "kept.html")
    print(f"{out / 'kept.html'}")
    return 0


def missing(specs: Sequence[RunSpec], kept: Sequence[Line], processor: str) -> list[RunSpec]:
    """The runs that no kept line has: of this processor, or of any where both models come with the package.

    A method that is full OPD itself on a pair has none. With them full OPD on this machine, beside which they count,
    and the runs whose windows a control replays.
    """
    known, anywhere = {identity(line) for line in kept}, {identity(line, RUN) for line in kept}
    lines = {spec.key: _known_by(spec.key, spec.config, processor) for spec in specs}
    full = {(line["pair"], line["settings"]) for line in lines.values() if line["method"] == "full"}
    again = {
        spec.key
        for spec in specs
        if spec.method.name != "full" and not spec.method.replays and (spec.pair, lines[spec.key]["settings"]) in full
    }
    here = {key for key, line in lines.items() if identity(line) in known}
    there = {spec.key for spec in specs if _is_shipped(spec.config) and identity(lines[spec.key], RUN) in anywhere}
    wanted = [spec for spec in specs if spec.key not in here | there | again]
    beside = {f"{spec.pair}/full/{spec.seed}" for spec in wanted} - here
    beside |= {f"{spec.pair}/{spec.method.against}/{spec.seed}" for spec in wanted if spec.method.replays}
    return [spec for spec in specs if spec in wanted or spec.key in beside]


def _is_shipped(config: TrainConfig) -> bool:
    """Whether a run begins with models that come with the package: all machines had the same tokens so far."""
    return all(Path(str(model)).parent == shipped_models_dir() for model in (config.student, config.teacher))


def processor() -> str:
    """Its name, and which of vLLM's kernels it has: they may round differently, and a seed's rollouts be others."""
    wide = "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return f"{environment()['cpu']}, {'AVX-512' if wide else 'AVX2'}"


def finished_lines(folder: Path, processor: str) -> list[Line]:
    """The finished runs below `prune-opd bench strategies`' folder, but those of another size (`--quick`)."""
    lines = []
    for path in sorted(folder.glob("*/*/*/wanted.json")):
        wanted = Wanted.read(path.parent)
        records = finished(wanted, path.parent)
        if records is None or wanted.config.evaluation.problems not in (0, Settings.problems):
            continue
        line = _known_by("/".join(path.parent.parts[-3:]), wanted.config, processor)
        line |= _kept_numbers(run_numbers(*records))
        if judged := read_judged(path.parent):
            line["judged"] = kept_numbers(judged)
        lines.append(line)
    return lines


def _known_by(key: str, config: TrainConfig, processor: str) -> Line:
    """What tells the run of a RunSpec's key from all others."""
    pair, method, seed = key.split("/")
    return {
        "pair": pair,
        "method": method,
        "seed": int(seed),
        "settings": settings_digest(config),
        "processor": processor,
        "compiled": config.rollout.enforce_eager is False,
    }


def _kept_numbers(run: dict[str, Any]) -> dict[str, Any]:
    return {
        "accuracy": round(run["accuracy"], 5),
        "tokens_generated": round(run["tokens_generated"]),
        "cpu_s": {phase: round(seconds, 2) for phase, seconds in run["phases_cpu_s"].items()},
        "last_window": run["horizon"][-1],
        "overlap_at_start": round(run["overlap"][0], 4),
        # For the curves: evaluations as [step, response tokens until then, accuracy], others at every `EVERY`th step.
        "evaluations": [[at["step"], round(at["tokens"]), round(at["accuracy"], 4)] for at in run["curve"]],
        "windows": run["horizon"][::EVERY],
        "overlaps": [round(value, 3) for value in run["overlap"][::EVERY]],
    }
