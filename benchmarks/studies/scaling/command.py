"""`prune-opd bench scaling`: a step against response length, batch, model size and ranks: seconds by phase, and memory.

A launch is one model on one number of ranks (scaling_ranks.py says what is measured); the points of an axis are steps
of one launch or of several. Beside the slope of each phase (log-log, of CPU seconds of all ranks, which other work on
the machine disturbs less than the wall clock) stands that of the work it has to do (scaling_work.py). No torch here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.loss.command import MIB, environment
from benchmarks.studies.scaling.work import AXES, PHASES, SLACK, Growth, growth, shape_of, work
from prune_opd.errors import UserError

TIMEOUT = 600  # seconds a launch may take
Model = tuple[int, int]  # layers, hidden size
Point = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is measured. Each axis varies from the base model on the most ranks, at `length` and `batch`.

    Along the ranks the rows of each stay the same: two have twice the batch. With the batch held instead, costs that do
    not depend on the rows (a step of the engine, of the optimizer) come once a rank and would pass for growth.
    """

    base: Model = (3, 256)
    models: tuple[Model, ...] = ((2, 128), (3, 256), (4, 384), (9, 512))  # 1 M, 3.4 M, 8.7 M, 30 M parameters
    vocab: int = 4096
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    batches: tuple[int, ...] = (16, 32, 64, 128, 256)
    ranks: tuple[int, ...] = (1, 2)
    length: int = 128
    batch: int = 16
    rounds: int = 2


QUICK = Settings(
    base=(1, 128),
    models=((1, 128),),
    vocab=512,
    lengths=(8, 16),
    batches=(4, 8),
    ranks=(2,),
    length=16,
    batch=4,
    rounds=1,
)


def run(path: Path, quick: bool, rounds: int = 2) -> int:
    """Measure, write the JSON file and the PNG beside it, print the tables. Returns 0 however fast anything grows.

    rounds: steps of each point; the quick size takes one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = QUICK if quick else Settings(rounds=rounds)
    console = Console()
    before = {**environment(), "load_average_before": os.getloadavg()}
    raw = _measure_all(settings, console)
    axes = _axes(settings, [point for launch in raw for point in _points(launch)])
    growths = [found for axis, points in axes.items() for found in _growths(axis, points)]
    result = {
        "benchmark": "scaling",
        "quick": quick,
        "settings": asdict(settings),
        "environment": {**before, "load_average_after": os.getloadavg()},
        "axes": axes,
        "growth": [asdict(found) | {"too_fast": found.too_fast} for found in growths],
        "raw": raw,
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    picture = path.with_suffix(".png")
    picture.write_bytes(_picture(result, growths))
    _print(result, growths, console)
    console.print(f"[bold]{path}[/], [bold]{picture}[/]", soft_wrap=True)
    return 0


# ---------------------------------------------------------------------------------------------------- measuring


def _launches(settings: Settings) -> list[tuple[Model, int, list[tuple[int, int]]]]:
    """Model, ranks, and the (batch, length) that it is measured at."""
    base = (settings.batch, settings.length)
    most = max(settings.ranks)
    sweep = {base, *((settings.batch, n) for n in settings.lengths), *((n, settings.length) for n in settings.batches)}
    others = [(model, most, [base]) for model in settings.models if model != settings.base]
    fewer = [(settings.base, ranks, [base]) for ranks in settings.ranks if ranks != most]
    return [(settings.base, most, sorted(sweep)), *others, *fewer]


def _measure_all(settings: Settings, console: Console) -> list[dict[str, Any]]:
    raw = []
    launches = _launches(settings)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("measuring", total=len(launches))
        for (layers, hidden), ranks, points in launches:
            bar.update(task, description=f"{layers} layers of {hidden}, {ranks} ranks")
            raw.append({"world": ranks, **_measure((layers, hidden), ranks, points, settings)})
            bar.advance(task)
    return raw


def _measure(model: Model, ranks: int, points: Sequence[tuple[int, int]], settings: Settings) -> dict[str, Any]:
    """One launch: what each rank measured. UserError if it did not come to its end."""
    with tempfile.TemporaryDirectory(prefix="prune-opd-") as folder:
        answer = Path(folder) / "answer.json"
        options = {
            "folder": folder,
            "json": answer,
            "layers": model[0],
            "hidden": model[1],
            "vocab": settings.vocab,
            "points": ",".join(f"{batch}x{length}" for batch, length in points),
            "rounds": settings.rounds,
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["-m", "benchmarks.studies.scaling.ranks"]
        command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        what = f"{model[0]} layers of {model[1]} on {ranks} ranks"
        try:
            process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            raise UserError(f"{what}: not done after {TIMEOUT} s") from None
        if process.returncode != 0 or not answer.exists():
            raise UserError(f"{what} failed:\n{process.stderr[-3000:]}")
        return json.loads(answer.read_text())


# ---------------------------------------------------------------------------------------------------- comparing


def _points(launch: dict[str, Any]) -> list[Point]:
    """Medians over the steps of each point: wall clock of the first rank, CPU seconds of all, memory of the largest."""
    ranks, model = launch["ranks"], shape_of(launch["model"])
    points = []
    for at, first in enumerate(ranks[0]["points"]):
        steps = list(zip(*(rank["points"][at]["steps"] for rank in ranks), strict=True))
        response = median(of[0]["response_length"] for of in steps)
        cpu = {phase: median(sum(rank["cpu_s"][phase] for rank in of) for of in steps) for phase in PHASES}
        points.append(
            {
                "parameters": model.parameters,
                "model": [launch["model"]["num_hidden_layers"], launch["model"]["hidden_size"]],
                "ranks": launch["world"],
                "batch": first["batch"],
                "limit": first["length"],
                "length": response,  # of the average response: some end by themselves
                "wall_s": {name: median(of[0]["wall_s"][name] for of in steps) for name in (*PHASES, "step")},
                "cpu_s": cpu | {"step": sum(cpu.values())},
                "step_bytes": median(max(rank["step_bytes"] for rank in of) for of in steps),
                "held_bytes": median(max(rank["held_bytes"] for rank in of) for of in steps),
                "work": work(model, first["batch"], ranks[0]["prompt_length"], response, launch["world"]),
            }
        )
    return points


def _axes(settings: Settings, points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of each axis, ascending. An axis with a single point is left out."""
    base = {
        "limit": settings.length,
        "batch": settings.batch,
        "model": list(settings.base),
        "ranks": max(settings.ranks),
    }
    found = {}
    for axis in AXES:
        if axis == "ranks":
            on = [point for point in points if _is(point, base | _same_rows(settings, point["ranks"]))]
        else:
            free = {"length": "limit", "parameters": "model"}.get(axis, axis)
            on = [point for point in points if _is(point, base | {free: point[free]})]
        if len(on) > 1:
            found[axis] = sorted(on, key=lambda point: point[axis])
    return found


def _is(point: Point, wanted: dict[str, Any]) -> bool:
    return all(point[key] == value for key, value in wanted.items())


def _same_rows(settings: Settings, ranks: int) -> dict[str, int]:
    """`settings.batch` on the fewest ranks, and as many rows for each of more."""
    return {"ranks": ranks, "batch": settings.batch * ranks // min(settings.ranks)}


def _growths(axis: str, points: Sequence[Point]) -> list[Growth]:
    """Of CPU seconds by phase, and of memory: along model size all that a rank holds, else what a step adds to it."""
    x = [point[axis] for point in points]
    found = [
        growth(axis, phase, x, [point["cpu_s"][phase] for point in points], [point["work"][phase] for point in points])
        for phase in PHASES
    ]
    memory = [point["held_bytes" if axis == "parameters" else "step_bytes"] for point in points]
    # Packed micro-batches have a budget of tokens: up to it activations grow with a rank's tokens, then no more.
    expected = [1.0] * len(x) if axis == "ranks" else x
    return [*found, growth(axis, "memory", x, [max(value, 1) for value in memory], expected)]


# ---------------------------------------------------------------------------------------------------- showing


def _print(result: dict[str, Any], growths: Sequence[Growth], console: Console) -> None:
    settings, machine = result["settings"], result["environment"]
    console.print(
        f"{machine['cpus']} CPUs, one thread a rank, data parallel, an engine a rank; medians of {settings['rounds']} "
        f"steps; load average {machine['load_average_before'][0]:.1f} → {machine['load_average_after'][0]:.1f}"
    )
    for axis, points in result["axes"].items():
        table = Table(title=f"against {AXES[axis]}", title_justify="left")
        for column in (AXES[axis], "step s", "CPU s", *(f"{phase} CPU s" for phase in PHASES), "memory MiB"):
            table.add_column(column, justify="right")
        memory = "held_bytes" if axis == "parameters" else "step_bytes"
        for point in points:
            cpu = point["cpu_s"]
            row = [point["wall_s"]["step"], cpu["step"], *(cpu[phase] for phase in PHASES)]
            table.add_row(f"{point[axis]:,.0f}", *(f"{value:.2f}" for value in row), f"{point[memory] / MIB:.0f}")
        found = {one.what: one for one in growths if one.axis == axis}
        columns = (*PHASES, "memory")
        table.add_section()
        table.add_row("slope (last two)", "", "", *(str(found[what]) for what in columns))
        table.add_row("of the work", "", "", *(found[what].expectation for what in columns))
        console.print(table)
    fast = [one for one in growths if one.too_fast]
    for one in fast:
        console.print(
            f"  [red]faster than its work[/]: {one.what} along {AXES[one.axis]}: {one}, work {one.expectation}"
        )
    if not fast:
        console.print(f"  nothing grows faster than its work (slack {SLACK:g})")


def _picture(result: dict[str, Any], growths: Sequence[Growth]) -> bytes:
    """CPU seconds by phase along each axis, log-log, with the slopes in the legend."""
    from prune_opd.track.plotting import CYCLE, Chart, axes, legend, overview_png

    def chart(axis: str, points: Sequence[Point]) -> Chart:
        def draw(figure: Any) -> None:
            ax = axes(figure, AXES[axis], "CPU seconds of all ranks")
            x = [point[axis] for point in points]
            for phase, colour in zip(PHASES, CYCLE, strict=False):
                (found,) = (one for one in growths if (one.axis, one.what) == (axis, phase))
                label = f"{phase} {found.slope:.2f} (work {found.work_slope:.2f})"
                ax.plot(x, [point["cpu_s"][phase] for point in points], marker="o", color=colour, label=label)
            ax.set(xscale="log", yscale="log")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.set_xticks(x, [f"{value:,.0f}" for value in x], minor=False)
            ax.set_xticks([], minor=True)
            legend(ax, ncols=2)

        return Chart(f"Step time against {AXES[axis]}", "", draw)

    charts = [chart(axis, points) for axis, points in result["axes"].items()]
    return overview_png("Growth of a step", "CPU seconds by phase, log-log slopes beside those of the work", charts)
