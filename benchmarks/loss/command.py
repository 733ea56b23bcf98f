"""`prune-opd bench loss`: the fused loss against full logits, TRL's loss and the bare matrix products.

Every measurement is a process of its own (loss.py says how it measures). The contenders take turns, round after round,
so that what else the machine does falls on all of them; a ratio is that of two medians. No torch on this side.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from prune_opd.errors import UserError

CONTENDERS = ("ours", "ours_no_buffer", "naive", "trl", "floor")
BENCH_PACKAGES = Path(__file__).resolve().parents[2] / ".venv-bench"  # trl and what it needs: `make setup-bench`
SAME_LOSS = 1e-4  # relative
MIB = 2**20


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


@dataclass(frozen=True)
class Target:
    """A ratio and what it must not exceed, or must reach."""

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def reached(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        return f"{self.name}: {self.value:.2f} ({'≥' if self.at_least else '≤'} {self.limit:g})"


def run(path: Path, quick: bool) -> int:
    """Measure, write the JSON file, print the tables. Returns 0 whether or not the targets are reached."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = QUICK if quick else Settings()
    console = Console()
    machine = {**environment(), "load_average_before": os.getloadavg()}
    raw = _measure_all(settings, console)
    result = {
        "benchmark": "loss",
        "quick": quick,
        "settings": asdict(settings),
        "environment": {
            **machine,
            "load_average_after": os.getloadavg(),
            "torch": raw[0]["torch"],
            "threads": raw[0]["threads"],
        },
        "vocabularies": [{**_compare(raw, vocab), "chunk": settings.chunk(vocab)} for vocab in settings.vocabularies],
        "growth": _growth(raw, settings),
        "skipped": {} if has_trl() else {"trl": "the package trl is not there: run `make setup-bench`"},
        "raw": raw,
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _print(result, console)
    console.print(f"[bold]{path}[/]", soft_wrap=True)
    return 0


# ---------------------------------------------------------------------------------------------------- measuring


def _measure_all(settings: Settings, console: Console) -> list[dict[str, Any]]:
    """Every measurement, in the order it was taken."""
    contenders = [name for name in CONTENDERS if name != "trl" or has_trl()]
    rounds: list[tuple[str, str, int, int]] = []
    for vocab in settings.vocabularies:
        for turn in range(settings.rounds):
            shift = turn % len(contenders)
            order = contenders[shift:] + contenders[:shift]
            rounds += [("contest", name, vocab, settings.tokens) for name in order]
    for _ in range(settings.growth_rounds):
        rounds += [("growth", "ours", settings.growth_vocab, tokens) for tokens in settings.growth_tokens]
    raw = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(rounds))
        for part, name, vocab, tokens in rounds:
            progress.update(task, description=f"{name}, {tokens} tokens, {vocab} token ids")
            raw.append({"part": part, **_measure(name, vocab, tokens, settings)})
            progress.advance(task)
    return raw


def _measure(contender: str, vocab: int, tokens: int, settings: Settings) -> dict[str, Any]:
    """One process: what loss.py measured, with what was asked for. UserError if it did not come to its end."""
    numbers = {
        "tokens": tokens,
        "vocab": vocab,
        "student-size": settings.student_size,
        "teacher-size": settings.teacher_size,
        "chunk": settings.chunk(vocab),
        "threads": settings.threads,
        "repeats": settings.repeats,
    }
    options = [text for name, number in numbers.items() for text in (f"--{name}", str(number))]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(settings.threads),
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(BENCH_PACKAGES)])),
    }
    with tempfile.TemporaryDirectory(prefix="prune-opd-") as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.loss.measure", contender, *options, "--json", str(answer)]
        process = subprocess.run(command, env=env, capture_output=True, text=True)
        if process.returncode != 0:
            last = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            hint = " (killed: was there enough memory?)" if process.returncode == -9 else ""
            raise UserError(f"{contender} with {tokens} tokens and {vocab} token ids failed{hint}: {last}")
        return {"contender": contender, "vocab": vocab, "tokens": tokens, **json.loads(answer.read_text())}


def has_trl() -> bool:
    return importlib.util.find_spec("trl") is not None or (BENCH_PACKAGES / "trl").is_dir()


def environment() -> dict[str, Any]:
    cpu = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "cpus": os.cpu_count(),
        "cpu": cpu[0] if cpu else platform.processor(),
        "memory_gib": round(memory[0] / MIB, 1) if memory else None,
        "python": platform.python_version(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


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


def _compare(raw: list[dict[str, Any]], vocab: int) -> dict[str, Any]:
    """Medians and ratios at one vocabulary, and the targets that apply."""
    rows = [row for row in raw if row["part"] == "contest" and row["vocab"] == vocab]
    by_name = {
        name: _medians(row for row in rows if row["contender"] == name)
        for name in CONTENDERS
        if any(row["contender"] == name for row in rows)
    }
    ours, naive, floor = by_name["ours"], by_name["naive"], by_name["floor"]
    apart = abs(ours["loss"] - naive["loss"]) / abs(naive["loss"])
    ratios = {
        "extra_naive_over_ours": naive["extra_bytes"] / ours["extra_bytes"],
        "extra_naive_over_ours_no_buffer": naive["extra_bytes"] / by_name["ours_no_buffer"]["extra_bytes"],
        "time_ours_over_naive": ours["wall_s"] / naive["wall_s"],
        "time_ours_over_floor": ours["wall_s"] / floor["wall_s"],
        "cpu_ours_over_naive": ours["cpu_s"] / naive["cpu_s"],
        "cpu_ours_over_floor": ours["cpu_s"] / floor["cpu_s"],
    }
    if "trl" in by_name:
        ratios["extra_trl_over_ours"] = by_name["trl"]["extra_bytes"] / ours["extra_bytes"]
        ratios["time_ours_over_trl"] = ours["wall_s"] / by_name["trl"]["wall_s"]
    targets = []
    if vocab in Settings.vocabularies:  # not of the quick size
        targets.append(Target("time, ours / naive", ratios["time_ours_over_naive"], 1))
        targets.append(Target("time, ours / floor", ratios["time_ours_over_floor"], 1.25))
    if vocab == max(Settings.vocabularies):
        memory = "peak extra memory, naive / ours"
        targets.insert(0, Target(memory, ratios["extra_naive_over_ours"], 25, at_least=True))
    return {
        "vocab": vocab,
        "contenders": by_name,
        "ratios": ratios,
        "loss_apart": apart,
        "same_loss": apart <= SAME_LOSS,
        "targets": [{**asdict(target), "reached": target.reached, "text": str(target)} for target in targets],
    }


def _growth(raw: list[dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """Ours by number of tokens; time and memory are relative to the fewest tokens: per token, and in all."""
    lines = []
    for tokens in settings.growth_tokens:
        line = _medians(row for row in raw if row["part"] == "growth" and row["tokens"] == tokens)
        lines.append({"tokens": tokens, **line})
    first = lines[0]
    for line in lines:
        line["time_per_token_ratio"] = line["wall_s"] / line["tokens"] / (first["wall_s"] / first["tokens"])
        line["cpu_per_token_ratio"] = line["cpu_s"] / line["tokens"] / (first["cpu_s"] / first["tokens"])
        line["extra_ratio"] = line["extra_bytes"] / first["extra_bytes"]
    return lines


# ---------------------------------------------------------------------------------------------------- printing


def _print(result: dict[str, Any], console: Console) -> None:
    settings, environment = result["settings"], result["environment"]
    console.print(
        f"{settings['tokens']} tokens, hidden {settings['student_size']} (student) and {settings['teacher_size']} "
        f"(teacher), fp32, {environment['threads']} threads on {environment['cpus']} "
        f"CPUs, torch {environment['torch']}; medians of {settings['rounds']} rounds × {settings['repeats']} calls; "
        f"load average {environment['load_average_before'][0]:.1f} → {environment['load_average_after'][0]:.1f}"
    )
    for part in result["vocabularies"]:
        table = Table(title=f"vocabulary {part['vocab']}, chunks of {part['chunk']} tokens", title_justify="left")
        for column in ("", "time s", "CPU s", "peak extra memory MiB", "loss"):
            table.add_column(column, justify="right" if column else "left")
        for name, row in part["contenders"].items():
            table.add_row(
                name,
                f"{row['wall_s']:.2f}",
                f"{row['cpu_s']:.2f}",
                f"{row['extra_bytes'] / MIB:.0f}",
                "" if row["loss"] is None else f"{row['loss']:.6g}",
            )
        console.print(table)
        for target in part["targets"]:
            console.print(f"  {'[green]pass[/]' if target['reached'] else '[red]miss[/]'}  {target['text']}")
        same = "[green]same[/]" if part["same_loss"] else "[red]not the same[/]"
        console.print(f"  {same}  loss of ours and naive, {part['loss_apart']:.1e} apart")
        for name, ratio in part["ratios"].items():
            console.print(f"        {name.replace('_', ' ')}: {ratio:.2f}")
    for name, reason in result["skipped"].items():
        console.print(f"  [yellow]skipped[/]  {name}: {reason}")
    table = Table(title=f"growth of ours, vocabulary {settings['growth_vocab']}", title_justify="left")
    for column in ("tokens", "time s", "time per token ÷ first", "CPU per token ÷ first", "peak extra memory MiB"):
        table.add_column(column, justify="right")
    for line in result["growth"]:
        table.add_row(
            str(line["tokens"]),
            f"{line['wall_s']:.2f}",
            f"{line['time_per_token_ratio']:.2f}",
            f"{line['cpu_per_token_ratio']:.2f}",
            f"{line['extra_bytes'] / MIB:.0f}",
        )
    console.print(table)
