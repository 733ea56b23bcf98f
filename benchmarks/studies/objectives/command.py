"""`prune-opd bench objectives`: what each objective costs in the fused loss, at a large vocabulary, by ranks.

CPU seconds of a forward and backward of all ranks of a tensor-parallel group together, and the peak memory beyond the
inputs of the rank that needs most, relative to the published objective at the same number of ranks. The objectives
take turns. What they are worth, docs/objectives.md has.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.common import BENCH, Out, Quick, Report, load, measure, rotated, table

OBJECTIVES: dict[str, dict[str, Any]] = {
    "topk_reverse_kl (published)": {},
    "tail = bucket": {"tail": "bucket"},
    "tail = centred": {"tail": "centred"},
    "support = union": {"support": "union"},
    "local_support_matching": {"name": "local_support_matching"},
    "topk_forward_kl": {"name": "topk_forward_kl"},
    "sampled_token": {"name": "sampled_token"},
    "full_vocab_reverse_kl": {"name": "full_vocab_reverse_kl"},
    "full_vocab_jsd": {"name": "full_vocab_jsd"},
}
FIRST = next(iter(OBJECTIVES))


@dataclass(frozen=True)
class Settings:
    """What is measured. The defaults are the benchmark; QUICK only shows that it works."""

    tokens: int = 256
    vocab: int = 151_936
    sizes: tuple[int, int] = (1024, 2048)  # hidden, of student and teacher
    chunk: int = 64
    ranks: tuple[int, ...] = (1, 4)
    rounds: int = 3


QUICK = Settings(tokens=32, vocab=2048, sizes=(32, 64), chunk=16, ranks=(1, 2), rounds=1)


def run(out: Out = BENCH, quick: Quick = False) -> int:
    """Measure, write the JSON file, print a table for each number of ranks. Returns 0."""
    settings = QUICK if quick else Settings()
    report = Report(out / "objectives.json", quick, settings)
    raw: list[dict[str, Any]] = []
    for ranks in settings.ranks:
        for turn in range(settings.rounds):
            for name in rotated(list(OBJECTIVES), turn):
                request = {
                    "objective": OBJECTIVES[name],
                    "tokens": settings.tokens,
                    "vocab": settings.vocab,
                    "sizes": settings.sizes,
                    "chunk": settings.chunk,
                }
                module = "benchmarks.studies.objectives.measure"
                found = measure(module, request, f"{name} on {ranks} ranks", ranks=ranks, timeout=600)
                cpu, extra = sum(one["cpu_s"] for one in found), max(one["extra_bytes"] for one in found)
                raw.append({"ranks": ranks, "objective": name, "cpu_s": cpu, "extra_bytes": extra})
    rows = [_row(raw, ranks, name) for ranks in settings.ranks for name in OBJECTIVES]
    result = report.write(environment=report.environment(), rows=rows, raw=raw)
    columns = {
        "": "{objective}",
        "CPU s": "{cpu_s:.2f}",
        "CPU ÷ published": "{cpu:.2f}",
        "extra memory ÷ published": "{extra:.2f}",
    }
    for ranks in settings.ranks:
        title = f"{ranks} ranks, vocabulary {settings.vocab}, {settings.tokens} tokens; {load(result['environment'])}"
        report.console.print(table(title, columns, [row for row in rows if row["ranks"] == ranks]))
    report.name_files()
    return 0


def _row(raw: list[dict[str, Any]], ranks: int, name: str) -> dict[str, Any]:
    def middle(objective: str, key: str) -> float:
        return median(row[key] for row in raw if row["ranks"] == ranks and row["objective"] == objective)

    cpu, extra = middle(name, "cpu_s"), middle(name, "extra_bytes")
    relative = {"cpu": cpu / middle(FIRST, "cpu_s"), "extra": extra / max(middle(FIRST, "extra_bytes"), 1)}
    return {"ranks": ranks, "objective": name, "cpu_s": cpu, "extra_bytes": extra, **relative}
