"""`prune-opd bench keep`: adds the comparison's finished runs to the repository's, docs/strategies.jsonl."""

from __future__ import annotations

from pathlib import Path

from benchmarks.common import BENCH, Out, environment
from benchmarks.strategies.kept import KEPT, Line, keep, settings_digest
from benchmarks.strategies.plan import Settings
from benchmarks.strategies.rank import Wanted
from benchmarks.strategies.results import run_numbers
from benchmarks.strategies.runs import finished


def run(out: Out = BENCH) -> int:
    """Keep what has finished below DIR/strategies. Returns 0."""
    number = keep(KEPT, finished_lines(out / "strategies", processor()))
    print(f"{number} runs added to {KEPT}")
    return 0


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
