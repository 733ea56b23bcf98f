"""`prune-opd bench scaling`: a step against response length, batch, model size and ranks: seconds by phase, and memory.

A launch is one model on one number of ranks (measure.py says what is measured); the points of an axis are steps
of one launch or of several. Beside the slope of each phase (log-log, of CPU seconds of all ranks, which other work on
the machine disturbs less than the wall clock) stands that of the work it has to do (work.py). No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

from benchmarks.common import BENCH, Out, Quick, Report, load, measure, table
from benchmarks.studies.scaling.work import AXES, PHASES, SLACK, Growth, growth

TIMEOUT = 600  # seconds a launch may take
Model = tuple[int, int]  # layers, hidden size
Point = dict[str, Any]


class Place(NamedTuple):
    """Where a point is measured."""

    model: Model
    ranks: int
    batch: int
    length: int  # the limit of a response


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


def run(out: Out = BENCH, quick: Quick = False, rounds: int = 2) -> int:
    """Measure, write the JSON file and the PNG beside it, print the tables. Returns 0 however fast anything grows.

    rounds: steps of each point; the quick size takes one.
    """
    settings = QUICK if quick else Settings(rounds=rounds)
    report = Report(out / "scaling.json", quick, settings)
    raw, todo = [], list(launches(settings).items())
    for (model, ranks), places in track(todo, "measuring", console=report.console, transient=True):
        raw.append(_measure(model, ranks, places, settings))
    points = {place: point for launch in raw for place, point in _points(launch)}
    axes = {axis: [points[place] for place in places] for axis, places in axes_of(settings).items()}
    growths = [found for axis, points in axes.items() for found in _growths(axis, points)]
    growth_records = [asdict(found) | {"too_fast": found.too_fast} for found in growths]
    result = report.write(axes=axes, growth=growth_records, raw=raw)
    picture = report.path.with_suffix(".png")
    picture.write_bytes(_picture(result, growths))
    _print(result, growths, report.console)
    report.name_files(picture)
    return 0


# ---------------------------------------------------------------------------------------------------- measuring


def axes_of(settings: Settings) -> dict[str, list[Place]]:
    """The places of each axis, ascending; an axis with a single one is left out. The ranks' have the same rows each."""
    base = Place(settings.base, max(settings.ranks), settings.batch, settings.length)
    rows = settings.batch // min(settings.ranks)
    axes = {
        "length": [base._replace(length=length) for length in settings.lengths],
        "batch": [base._replace(batch=batch) for batch in settings.batches],
        "parameters": [base._replace(model=model) for model in settings.models],
        "ranks": [base._replace(ranks=ranks, batch=ranks * rows) for ranks in settings.ranks],
    }
    return {axis: places for axis, places in axes.items() if len(places) > 1}


def launches(settings: Settings) -> dict[tuple[Model, int], list[tuple[int, int]]]:
    """Model and ranks → the (batch, length) that they are measured at."""
    places = sorted({place for places in axes_of(settings).values() for place in places})
    return {
        launch: [(place.batch, place.length) for place in of_launch]
        for launch, of_launch in groupby(places, key=lambda place: (place.model, place.ranks))
    }


def _measure(model: Model, ranks: int, points: Sequence[tuple[int, int]], settings: Settings) -> dict[str, Any]:
    """One launch: what each rank measured. UserError if it did not come to its end."""
    request = {"shape": (*model, settings.vocab), "points": points, "rounds": settings.rounds}
    what = f"{model[0]} layers of {model[1]} on {ranks} ranks"
    found = measure("benchmarks.studies.scaling.measure", request, what, ranks=ranks, timeout=TIMEOUT)
    return {"world": ranks, "model": model, "ranks": found}


# ---------------------------------------------------------------------------------------------------- comparing


def _points(launch: dict[str, Any]) -> Iterator[tuple[Place, Point]]:
    """Medians over the steps of each point: wall clock of the first rank, CPU seconds of all, memory of the largest."""
    ranks = launch["ranks"]
    for at, first in enumerate(ranks[0]["points"]):
        steps = list(zip(*(rank["points"][at]["steps"] for rank in ranks), strict=True))
        place = Place(launch["model"], launch["world"], first["batch"], first["length"])
        yield (
            place,
            {
                **place._asdict(),
                "parameters": ranks[0]["parameters"],
                "limit": place.length,
                "length": median(
                    of[0]["response_length"] for of in steps
                ),  # of the average one: some end by themselves
                "wall_s": {name: median(of[0]["wall_s"][name] for of in steps) for name in first["steps"][0]["wall_s"]},
                "cpu_s": {
                    name: median(sum(rank["cpu_s"][name] for rank in of) for of in steps)
                    for name in first["steps"][0]["cpu_s"]
                },
                "step_bytes": median(max(rank["step_bytes"] for rank in of) for of in steps),
                "held_bytes": median(max(rank["held_bytes"] for rank in of) for of in steps),
                "work": {phase: median(of[0]["work"][phase] for of in steps) for phase in PHASES},
            },
        )


def _growths(axis: str, points: Sequence[Point]) -> list[Growth]:
    """Growth of CPU seconds by phase, and of memory: along model size all that a rank holds, else what a step adds."""
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
    settings, columns = result["settings"], (*PHASES, "memory")
    console.print(
        f"one thread a rank, data parallel, an engine a rank; medians of {settings['rounds']} steps; "
        f"{load(result['environment'])}"
    )
    for axis, points in result["axes"].items():
        seconds = {"step s": "{wall_s[step]:.2f}", "CPU s": "{cpu_s[step]:.2f}"}
        seconds |= {f"{phase} CPU s": f"{{cpu_s[{phase}]:.2f}}" for phase in PHASES}
        memory = "held_bytes" if axis == "parameters" else "step_bytes"
        names = {AXES[axis]: f"{{{axis}:,.0f}}", **seconds, "memory MiB": f"{{{memory}!m:.0f}}"}
        drawn = table(f"against {AXES[axis]}", names, points, left=0)
        found = {one.what: one for one in growths if one.axis == axis}
        drawn.add_section()
        drawn.add_row("slope (last two)", "", "", *(str(found[what]) for what in columns))
        drawn.add_row("of the work", "", "", *(found[what].expectation for what in columns))
        console.print(drawn)
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
