"""What the benchmarks share: measuring in processes of their own, the JSON file, targets and tables.

No torch here: `prune-opd bench` itself only starts processes, reads their answers and compares.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import re
import resource
import signal
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, TypeVar

import psutil
import typer
from rich.console import Console
from rich.table import Table

from prune_opd.config import ModelShape
from prune_opd.errors import UserError
from prune_opd.process import end_with_parent, rank_environment, table_console

BENCH_PACKAGES = Path(__file__).resolve().parents[1] / ".venv-bench"  # trl and what it needs: `make setup-bench`
MIB = 2**20
T = TypeVar("T")
BENCH = Path("bench")
Out = Annotated[Path, typer.Option(metavar="DIR", help="Where NAME.json goes.")]
Quick = Annotated[bool, typer.Option("--quick", help="A small size that only shows that it works.")]


# ---------------------------------------------------------------------------------------------------- processes


def measure(
    module: str,
    request: dict[str, Any],
    what: str,
    *,
    ranks: int | None = None,
    threads: int = 1,
    timeout: float | None = None,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Have `module` answer `request` in a process of its own, or in `ranks` processes under torchrun.

    The module hands its function to `answer`, which calls it with the request's keywords. Returns what the function
    returned, rank by rank. timeout: seconds. env: on top of this process's own.

    Raises:
        UserError: a process failed or took too long; the message begins with `what`.
    """
    with tempfile.TemporaryDirectory(prefix="prune-opd-") as folder:
        command = python(["-m", module, json.dumps(request), folder], ranks)
        settings = {**os.environ, "OMP_NUM_THREADS": str(threads), **(env or {})}
        settings = settings if ranks is None else rank_environment(settings)
        try:
            done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise UserError(f"{what}: not done after {timeout:g} s") from None
        if done.returncode != 0:
            hint = " (killed: was there enough memory?)" if done.returncode == -signal.SIGKILL else ""
            said = last_words(done.stderr) if ranks is None else f"\n{done.stderr[-3000:]}"
            raise UserError(f"{what} failed with exit code {done.returncode}{hint}: {said}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks or 1)]


def answer(function: Callable[..., Any]) -> None:
    """The main program on the other side of `measure`."""
    end_with_parent(signal.SIGKILL)
    request, folder = sys.argv[1:]
    try:
        result = function(**json.loads(request))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    (Path(folder) / f"{rank()}.json").write_text(json.dumps(result))


def python(arguments: list[str], ranks: int | None) -> list[str]:
    """The command line of a Python program: alone (None), or once a rank under torchrun on this machine."""
    if ranks is None:
        return [sys.executable, *arguments]
    agent = ["-m", "prune_opd.ranks.launcher", "--standalone", "--local-addr", "127.0.0.1"]
    return [sys.executable, *agent, "--nproc-per-node", str(ranks), *arguments]


def last_words(output: str) -> str:
    """The last error line of a process's output; without one, its last line."""
    lines = output.strip().splitlines() or ["it said nothing"]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])


def rank() -> int:
    """The rank of this process; 0 if torchrun did not start it."""
    return int(os.environ.get("RANK", "0"))


def rotated(items: Sequence[T], turn: int) -> list[T]:
    """The items in another order each turn, so that none always comes first."""
    shift = turn % len(items)
    return [*items[shift:], *items[:shift]]


def has_package(name: str) -> bool:
    """Whether a contender's package is there, in this environment or in .venv-bench."""
    return importlib.util.find_spec(name) is not None or (BENCH_PACKAGES / name).is_dir()


def has_trl() -> bool:
    return has_package("trl")


def with_trl() -> dict[str, str]:
    """What lets a process import TRL, and what else is beside it."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(BENCH_PACKAGES)]))
    return {"PYTHONPATH": path, "TRL_EXPERIMENTAL_SILENCE": "1"}


# ---------------------------------------------------------------------------------------------------- models


def model_shape(layers: int, hidden: int) -> ModelShape:
    """A Qwen3 with heads of 64 and tied embeddings, for random weights."""
    return ModelShape(layers, hidden, hidden // 64, max(2, hidden // 128), 64, 3 * hidden)


def write_model(folder: Path, shape: ModelShape, vocab: int, seed: int = 0) -> None:
    """A model directory with random weights and the ledger's tokenizer."""
    from prune_opd.data import ledger
    from prune_opd.testbed.sft import create_model

    create_model(folder, shape, seed, vocab)
    ledger.save_tokenizer(folder)


# ---------------------------------------------------------------------------------------------------- this process


def cpu_time() -> float:
    """CPU seconds of all threads of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def reset_peak() -> int:
    """Start the kernel's peak of resident memory anew. Returns what is resident now [bytes]."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def resident() -> int:
    """What is resident of this process now [bytes]."""
    return _resident("VmRSS")


def peak_memory() -> int:
    """The peak of resident memory since `reset_peak`, or since the process began [bytes]."""
    return _resident("VmHWM")


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


# ---------------------------------------------------------------------------------------------------- results


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

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "reached": self.reached, "text": str(self)}


class Report:
    """A benchmark's JSON file: made before the first measurement, written after the last."""

    def __init__(self, path: Path, quick: bool, settings: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.console = path, table_console()
        self.head = {"benchmark": path.stem, "quick": quick, "settings": asdict(settings)}
        self.before = {**environment(), "load_average_before": os.getloadavg()}

    def environment(self, **more: Any) -> dict[str, Any]:
        """The machine, and its load before the measurements and now."""
        return {**self.before, "load_average_after": os.getloadavg(), **more}

    def write(self, **parts: Any) -> dict[str, Any]:
        """Write and return everything; `parts` win over what the report knows by itself."""
        result = {**self.head, "environment": self.environment(), **parts}
        self.path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result

    def name_files(self, *more: Path) -> None:
        """The last line of a benchmark: where the results are."""
        self.console.print(", ".join(f"[bold]{path}[/]" for path in (self.path, *more)), soft_wrap=True)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None for one value."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def environment() -> dict[str, Any]:
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpus": os.cpu_count(),
        "cpu": cpu[1] if cpu else platform.processor(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
    }


# ---------------------------------------------------------------------------------------------------- printing


class _Cell(string.Formatter):
    """`str.format` in which `{bytes!m}` is in MiB, and None is nothing."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion != "m":
            return super().convert_field(value, conversion)
        return None if value is None else value / MIB

    def format_field(self, value: Any, format_spec: str) -> str:
        return "" if value is None else str(super().format_field(value, format_spec))


def table(title: str, columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]], left: int = 1) -> Table:
    """A table of records. columns: heading → how a cell is written, as in `_Cell`; the first `left` are names."""
    found = Table(title=title, title_justify="left")
    for i, heading in enumerate(columns):
        found.add_column(heading, justify="left" if i < left else "right")
    for row in rows:
        found.add_row(*(_Cell().vformat(form, (), row) for form in columns.values()))
    return found


def load(environment: dict[str, Any]) -> str:
    """The machine, for a line above a table."""
    before, after = (environment[f"load_average_{when}"][0] for when in ("before", "after"))
    return f"{environment['cpus']} CPUs, load average {before:.1f} → {after:.1f}"


def print_targets(targets: Iterable[dict[str, Any]], console: Console) -> None:
    for target in targets:
        console.print(f"  {'[green]pass[/]' if target['reached'] else '[red]miss[/]'}  {target['text']}")
