"""`prune-opd bench loss`: the fused loss against full logits, other systems' losses and the bare matrix products.

Every measurement is a process of its own (measure.py says how). The contenders take turns, round after round, so that
what else the machine does falls on all of them; a ratio is that of two medians. No torch on this side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from benchmarks.common import (
    BENCH,
    Out,
    Quick,
    Report,
    Target,
    has_package,
    load,
    measure,
    print_targets,
    rotated,
    table,
    with_trl,
)

CONTENDERS = ("ours", "ours_no_metrics", "ours_no_buffer", "ours_full", "naive", "trl", "liger", "nemo_rl", "floor")
PACKAGES = {"trl": "trl", "liger": "liger_kernel"}  # of the contenders that need one
SAME_KIND = {"trl": "ours_full", "liger": "ours_full", "nemo_rl": "ours"}  # a rival → ours that does as much
IN_BF16 = ("ours", "floor")
COUNTED = ("topk_reverse_kl", "full_vocab_reverse_kl")  # by count.py
PATHS = ("torch", "triton")  # objective.kernels
SAME_LOSS = 1e-4  # relative
OVER_FLOOR = 1.25  # time of ours over the floor's, at most
METRICS_TIME, METRICS_MEMORY = 1.03, 1.02  # of ours over ours without what only metrics need, at most
TIMES = {"time": "wall", "cpu": "cpu"}
MEMORY = {"peak extra memory MiB": "{extra_bytes!m:.0f}"}


@dataclass(frozen=True)
class Settings:
    """What is measured. The defaults are the benchmark; QUICK only shows that it works."""

    tokens: int = 2048
    student_size: int = 256
    teacher_size: int = 512
    vocabularies: tuple[int, ...] = (32_000, 151_936)
    # Tokens at a time, of ours and of the floor, at each vocabulary. Larger chunks are faster and hold more logits.
    chunks: tuple[int, ...] = (512, 64)
    threads: int = 2
    rounds: int = 5
    repeats: int = 1  # timed calls in a process
    growth_vocab: int = 151_936
    growth_tokens: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    growth_rounds: int = 2
    counted_ranks: tuple[int, ...] = (1, 8)
    counted_sizes: tuple[int, int] = (1536, 3584)  # hidden; nothing is computed
    counted_chunk: int = 1024

    def chunk(self, vocab: int) -> int:
        return self.chunks[self.vocabularies.index(vocab)]


QUICK = Settings(
    tokens=256,
    student_size=32,
    teacher_size=64,
    vocabularies=(8192,),
    chunks=(16,),
    threads=1,
    rounds=1,
    growth_vocab=8192,
    growth_tokens=(128, 256),
    growth_rounds=1,
)


Threads = Annotated[int, typer.Option(min=1, help="CPU threads of each contender; one where others use the machine.")]


def run(out: Out = BENCH, quick: Quick = False, threads: Threads = Settings.threads) -> int:
    """Measure, write the JSON file, print the tables. Returns 0 whether or not the targets are reached."""
    settings = QUICK if quick else replace(Settings(), threads=threads)
    report = Report(out / "loss.json", quick, settings)
    raw = _measure_all(settings, report.console)
    result = report.write(
        environment=report.environment(torch=raw[0]["torch"], threads=raw[0]["threads"]),
        vocabularies=[{**_compare(raw, vocab), "chunk": settings.chunk(vocab)} for vocab in settings.vocabularies],
        bf16=[{**_compare_bf16(raw, vocab), "chunk": settings.chunk(vocab)} for vocab in settings.vocabularies],
        growth=_growth(raw, settings),
        counted=_count(settings),
        skipped=_missing(),
        raw=raw,
    )
    _print(result, report.console)
    report.name_files()
    return 0


# ---------------------------------------------------------------------------------------------------- measuring


def _missing() -> dict[str, str]:
    """Contender → why it is left out."""
    return {
        contender: f"the package {package} is not there: run `make setup-bench`"
        for contender, package in PACKAGES.items()
        if not has_package(package)
    }


def _measure_all(settings: Settings, console: Console) -> list[dict[str, Any]]:
    """Every measurement, in the order it was taken."""
    contenders = [name for name in CONTENDERS if name not in _missing()]
    rounds = [
        (part, name, vocab, settings.tokens)
        for vocab in settings.vocabularies
        for part, names in (("contest", contenders), ("bf16", IN_BF16))
        for turn in range(settings.rounds)
        for name in rotated(names, turn)
    ]
    for _ in range(settings.growth_rounds):
        rounds += [("growth", "ours", settings.growth_vocab, tokens) for tokens in settings.growth_tokens]
    return [
        {"part": part, **_measure(name, vocab, tokens, settings, "bf16" if part == "bf16" else "fp32")}
        for part, name, vocab, tokens in track(rounds, "measuring", console=console, transient=True)
    ]


def _measure(contender: str, vocab: int, tokens: int, settings: Settings, dtype: str) -> dict[str, Any]:
    """One process: what was asked for, and what measure.py measured. UserError if it failed."""
    request = {
        "contender": contender,
        "tokens": tokens,
        "vocab": vocab,
        "sizes": (settings.student_size, settings.teacher_size),
        "chunk": settings.chunk(vocab),
        "threads": settings.threads,
        "repeats": settings.repeats,
        "dtype": dtype,
    }
    what = f"{contender} with {tokens} tokens and a vocabulary of {vocab} in {dtype}"
    (found,) = measure("benchmarks.loss.measure", request, what, threads=settings.threads, env=with_trl())
    return {"contender": contender, "vocab": vocab, "tokens": tokens, "dtype": dtype, **found}


def _count(settings: Settings) -> list[dict[str, Any]]:
    """What one chunk asks of a device, on a rank of a group, by objective and kernels."""
    size = {"vocab": settings.growth_vocab, "sizes": settings.counted_sizes, "chunk": settings.counted_chunk}
    what = [(name, path, ranks) for name in COUNTED for path in PATHS for ranks in settings.counted_ranks]
    requests = [{"objective": {"name": name, "kernels": path}, "ranks": ranks, **size} for name, path, ranks in what]
    (found,) = measure("benchmarks.loss.count", {"requests": requests}, "counting the kernels")
    return [
        {"objective": name, "path": path, "ranks": ranks, **row}
        for (name, path, ranks), row in zip(what, found, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------- comparing


def _medians(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    rows = list(rows)
    return {
        "wall_s": median(time for row in rows for time in row["wall_s"]),
        "cpu_s": median(time for row in rows for time in row["cpu_s"]),
        "extra_bytes": median(row["extra_bytes"] for row in rows),
        "loss": rows[0]["loss"],
        "grad_norms": rows[0]["grad_norms"],
    }


def _by_name(raw: list[dict[str, Any]], part: str, vocab: int) -> dict[str, dict[str, Any]]:
    """Medians of the contenders that ran."""
    rows = [row for row in raw if row["part"] == part and row["vocab"] == vocab]
    ran = [name for name in CONTENDERS if any(row["contender"] == name for row in rows)]
    return {name: _medians(row for row in rows if row["contender"] == name) for name in ran}


def _compare_bf16(raw: list[dict[str, Any]], vocab: int) -> dict[str, Any]:
    """Ours in bf16 against the products that it needs, with their sums in fp32: a floor of its own."""
    by_name = _by_name(raw, "bf16", vocab)
    ours, floor = by_name["ours"], by_name["floor"]
    ratios = {f"{of}_ours_over_floor": ours[f"{key}_s"] / floor[f"{key}_s"] for of, key in TIMES.items()}
    targets = []
    if vocab in Settings.vocabularies:
        targets.append(Target("time in bf16, ours / floor", ratios["time_ours_over_floor"], OVER_FLOOR))
    return {
        "vocab": vocab,
        "contenders": by_name,
        "ratios": ratios,
        "targets": [target.record() for target in targets],
    }


def _compare(raw: list[dict[str, Any]], vocab: int) -> dict[str, Any]:
    """Medians and ratios at one vocabulary, and the targets that apply."""
    by_name = _by_name(raw, "contest", vocab)
    ours, naive, floor, plain = (by_name[name] for name in ("ours", "naive", "floor", "ours_no_metrics"))
    apart = abs(ours["loss"] - naive["loss"]) / abs(naive["loss"])
    ratios = {
        "extra_naive_over_ours": naive["extra_bytes"] / ours["extra_bytes"],
        "extra_naive_over_ours_no_buffer": naive["extra_bytes"] / by_name["ours_no_buffer"]["extra_bytes"],
        "time_ours_over_naive": ours["wall_s"] / naive["wall_s"],
        "time_ours_over_floor": ours["wall_s"] / floor["wall_s"],
        "cpu_ours_over_naive": ours["cpu_s"] / naive["cpu_s"],
        "cpu_ours_over_floor": ours["cpu_s"] / floor["cpu_s"],
        "cpu_ours_over_ours_no_metrics": ours["cpu_s"] / plain["cpu_s"],
        "extra_ours_over_ours_no_metrics": ours["extra_bytes"] / plain["extra_bytes"],
    }
    for rival, name in SAME_KIND.items():
        if rival in by_name:
            theirs, same = by_name[rival], by_name[name]
            ratios[f"extra_{rival}_over_{name}"] = theirs["extra_bytes"] / same["extra_bytes"]
            ratios[f"time_{name}_over_{rival}"] = same["wall_s"] / theirs["wall_s"]
            ratios[f"cpu_{name}_over_{rival}"] = same["cpu_s"] / theirs["cpu_s"]
    targets = []
    if vocab in Settings.vocabularies:  # not of the quick size
        targets.append(Target("time, ours / naive", ratios["time_ours_over_naive"], 1))
        for rival, name in SAME_KIND.items():
            if rival in by_name:
                targets.append(Target(f"time, {name} / {rival}", ratios[f"time_{name}_over_{rival}"], 1))
        targets.append(Target("time, ours / floor", ratios["time_ours_over_floor"], OVER_FLOOR))
        metrics = "ours / ours without the metrics' sums"
        targets.append(Target(f"CPU, {metrics}", ratios["cpu_ours_over_ours_no_metrics"], METRICS_TIME))
        targets.append(Target(f"memory, {metrics}", ratios["extra_ours_over_ours_no_metrics"], METRICS_MEMORY))
    if vocab == max(Settings.vocabularies):
        memory = "peak extra memory, naive / ours"
        targets.insert(0, Target(memory, ratios["extra_naive_over_ours"], 25, at_least=True))
    return {
        "vocab": vocab,
        "contenders": by_name,
        "ratios": ratios,
        "loss_apart": apart,
        "same_loss": apart <= SAME_LOSS,
        "targets": [target.record() for target in targets],
    }


def _growth(raw: list[dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """Ours by number of tokens. Time per token and memory are also given relative to the fewest tokens."""
    rows = [row for row in raw if row["part"] == "growth"]
    lines = [
        {"tokens": tokens, **_medians(row for row in rows if row["tokens"] == tokens)}
        for tokens in settings.growth_tokens
    ]
    first = lines[0]
    for line in lines:
        line["time_per_token_ratio"] = line["wall_s"] / line["tokens"] / (first["wall_s"] / first["tokens"])
        line["cpu_per_token_ratio"] = line["cpu_s"] / line["tokens"] / (first["cpu_s"] / first["tokens"])
    return lines


# ---------------------------------------------------------------------------------------------------- printing


def _print(result: dict[str, Any], console: Console) -> None:
    settings, environment = result["settings"], result["environment"]
    console.print(
        f"{settings['tokens']} tokens, hidden {settings['student_size']} (student) and {settings['teacher_size']} "
        f"(teacher), fp32, {environment['threads']} threads, torch {environment['torch']}; medians of "
        f"{settings['rounds']} rounds × {settings['repeats']} calls; {load(environment)}"
    )
    for part in result["vocabularies"]:
        columns = {"": "{name}", "time s": "{wall_s:.2f}", "CPU s": "{cpu_s:.2f}", **MEMORY, "loss": "{loss:.6g}"}
        rows = [{"name": name, **row} for name, row in part["contenders"].items()]
        console.print(table(f"vocabulary {part['vocab']}, chunks of {part['chunk']} tokens", columns, rows))
        print_targets(part["targets"], console)
        same = "[green]same[/]" if part["same_loss"] else "[red]not the same[/]"
        console.print(f"  {same}  loss of ours and naive, {part['loss_apart']:.1e} apart")
        for name, ratio in part["ratios"].items():
            console.print(f"        {name.replace('_', ' ')}: {ratio:.2f}")
    for part in result["bf16"]:
        columns = {"": "{name}", "time s": "{wall_s:.2f}", "CPU s": "{cpu_s:.2f}", **MEMORY}
        rows = [{"name": name, **row} for name, row in part["contenders"].items()]
        title = f"bf16, sums in fp32: vocabulary {part['vocab']}, chunks of {part['chunk']} tokens"
        console.print(table(title, columns, rows))
        print_targets(part["targets"], console)
        for name, ratio in part["ratios"].items():
            console.print(f"        {name.replace('_', ' ')}: {ratio:.2f}")
    for name, reason in result["skipped"].items():
        console.print(f"  [yellow]skipped[/]  {name}: {reason}")
    columns = {
        "tokens": "{tokens}",
        "time s": "{wall_s:.2f}",
        "time per token ÷ first": "{time_per_token_ratio:.2f}",
        "CPU per token ÷ first": "{cpu_per_token_ratio:.2f}",
        **MEMORY,
    }
    console.print(table(f"growth of ours, vocabulary {settings['growth_vocab']}", columns, result["growth"], left=0))
    columns = {
        "": "{objective}",
        "by": "{path}",
        "ranks": "{ranks}",
        "kernels": "{kernels:.0f}",
        "waits": "{waits:.0f}",
        "collectives": "{collectives:.0f}",
        "passes, student": "{passes[0]:.1f}",
        "teacher": "{passes[1]:.1f}",
        "GB moved": "{gbytes:.1f}",
    }
    title = f"counted: a chunk of {settings['counted_chunk']} tokens, vocabulary {settings['growth_vocab']}, fp32"
    console.print(table(title, columns, result["counted"]))
