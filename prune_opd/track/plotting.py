"""What all charts share: colours, fonts, axes, and drawing a chart as an SVG or a PNG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

# Okabe and Ito's colours: told apart with every common colour blindness.
BLUE, ORANGE, GREEN, PURPLE, RED, TEAL, GREY = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#d55e00",
    "#56b4e9",
    "#a3adb8",
)
INK, MUTED = "#1f2933", "#5f6b7a"
# Paper and ink of report.css's dark page, for those of report.mplstyle.
DARK = {
    "#ffffff": "#1d232a",
    INK: "#e4e9ee",
    MUTED: "#9fabb8",
    "#c3cad3": "#566370",
    "#e6eaef": "#323b45",
    "#9ecae1": "#4a7ba6",  # early, middle, late: from pale to strong on both
    "#3a8fc4": "#7db8de",
    "#08306b": "#deebf7",
    "#000000": "#e4e9ee",
}
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, RED, TEAL, "#1f2933", "#8a949f")
PHASE_COLOURS = {
    "weight sync": TEAL,
    "rollout": BLUE,
    "reward": RED,
    "teacher": PURPLE,
    "train": ORANGE,
    "other": GREY,
    "evaluation": GREEN,
}
"""One colour a phase, the same in every chart; blue and orange are the two that dominate a step."""

STYLE = Path(__file__).with_name("assets") / "report.mplstyle"

SIZE = (6.2, 3.3)  # inches, of one chart
_DPI = 170
_SMOOTH_FROM = 60  # steps above which a noisy series is drawn as a moving mean over its pale raw values


@dataclass(frozen=True)
class Chart:
    """A chart. caption: how to read it. draw: fills a figure, or a part of one."""

    title: str
    caption: str
    draw: Callable[[Any], None]


def pictures(chart: Chart, with_png: bool) -> tuple[str, bytes | None]:
    """The chart alone as an SVG and, if asked for, as a PNG; without its title (the page shows that).

    The SVG is for light and for dark pages (`recoloured`); the layout, which costs as much as drawing, is made once.
    """
    with mpl.rc_context(fname=STYLE):
        figure = drawn(chart)
        png = _bytes(figure) if with_png else None
        if with_png:
            figure.set_layout_engine("none")
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
        width, height = (round(side * _DPI) for side in SIZE)
    return recoloured(buffer.getvalue(), width, height), png


def recoloured(svg: str, width: int, height: int) -> str:
    """matplotlib's SVG, `width` × `height` pixels large, whose paper and ink follow the reader's colour scheme.

    The colours of data stay, but for those of early and late steps. Browsers ask the media query in pictures too, so
    that the page needs one of each chart.
    """
    names = {colour: f"--c{number}" for number, colour in enumerate(DARK)}
    light = "".join(f"{name}:{colour};" for colour, name in names.items())
    dark = "".join(f"{name}:{DARK[colour]};" for colour, name in names.items())
    black = f"fill:var({names['#000000']})"  # where no colour stands
    blanks = "text{white-space:pre}"  # those at the ends of a label are there to keep it away from something
    style = f"<style>{blanks}:root{{{light}{black}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    known = rf"(fill|stroke): ({'|'.join(DARK)})\b"
    body = re.sub(known, lambda found: f"{found[1]}: var({names[found[2]]})", svg[svg.index("<svg") :])
    body = re.sub(r"<metadata>.*?</metadata>", "", body, count=1, flags=re.DOTALL)
    head, _, rest = body.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head) + f' width="{width}" height="{height}"'
    return f"{head}>{style}{rest}"


def drawn(chart: Chart) -> Figure:
    """The chart as a figure; in `mpl.rc_context(fname=STYLE)`, like everything that is drawn of it."""
    figure = Figure(figsize=SIZE, dpi=_DPI, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    chart.draw(figure)
    return figure


def _bytes(figure: Figure) -> bytes:
    """As a PNG. `Figure.savefig` would draw it twice, the first time for the layout, which drawing makes anyway."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def overview_png(title: str, subtitle: str, charts: Sequence[Chart], columns: int = 2) -> bytes:
    """All charts on one page as a PNG, with their titles."""
    with mpl.rc_context(fname=STYLE):
        rows = max(1, math.ceil(len(charts) / columns))
        height = rows * (SIZE[1] + 0.35)
        head = 0.85
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06)
        figure = Figure(figsize=(SIZE[0] * columns, height + head), dpi=130, layout=layout)
        parts: Any = figure.subfigures(2, 1, height_ratios=[head, height])
        top, body = parts
        top.text(0.015, 0.62, _clip(title, 38 * columns), fontsize=17, fontweight="bold", va="center")
        top.text(0.015, 0.20, _clip(subtitle, 75 * columns), fontsize=10.5, color=MUTED, va="center")
        if charts:
            cells = body.subfigures(rows, columns, squeeze=False, wspace=0.03, hspace=0.04)
            for cell, chart in zip(cells.flat, charts, strict=False):
                cell.suptitle(chart.title, x=0.03, ha="left", fontsize=11, fontweight="bold")
                chart.draw(cell)
        return _bytes(figure)


def axes(figure: Any, xlabel: str, ylabel: str, **kwargs: Any) -> Any:
    """One set of axes that fills the figure."""
    ax = figure.subplots(**kwargs)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return ax


def count_axis(axis: Any) -> None:
    """Whole numbers; where they are large, all in thousands (12k) or millions (3.4M)."""

    def text(value: float, _: int | None) -> str:
        highest = max(abs(v) for v in axis.get_view_interval())
        size, letter = (1e6, "M") if highest >= 2e6 else (1e3, "k") if highest >= 1e4 else (1.0, "")
        return f"{value / size:,.6g}{letter if value else ''}"

    axis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(text))


def from_zero(ax: Any) -> None:
    """The y axis from zero to a little above what is drawn. Call it after drawing."""
    highest = ax.dataLim.y1
    ax.set_ylim(0, 1.06 * highest if math.isfinite(highest) and highest > 0 else 1.0)


def percent_axis(axis: Any) -> None:
    axis.set_major_formatter(PercentFormatter(xmax=1))  # as many decimals as the ticks need


def accuracy_axis(ax: Any) -> None:
    """An axis in percent, from 0 to at most a little above 100."""
    percent_axis(ax.yaxis)
    ax.set_ylim(bottom=0, top=min(1.02, max(0.05, ax.get_ylim()[1])))


def time_unit(longest: float) -> tuple[str, float]:
    """The unit for times up to `longest` seconds: its name, and how many seconds it has."""
    return ("h", 3600.0) if longest >= 2 * 3600 else ("min", 60.0) if longest >= 300 else ("s", 1.0)


def trend(ax: Any, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    """A line; with many steps their centred moving mean, over the raw values in a pale colour."""
    if len(x) == 1:
        ax.plot(x, y, marker="o", **style)
    elif len(x) < _SMOOTH_FROM:
        ax.plot(x, y, **style)
    else:
        ax.plot(x, y, color=style.get("color"), alpha=0.25, linewidth=0.8)
        ax.plot(x, _moving_mean(y, half=max(2, len(y) // 50)), **style)


def legend(ax: Any, **kwargs: Any) -> None:
    """A legend above the axes, where it hides no data; none if nothing is labelled."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        # A label that begins with an underscore (a run may be named so) would be left out silently.
        shown = [" " + label if label.startswith("_") else label for label in labels]
        style = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "ncols": 3, "borderaxespad": 0.2, "handlelength": 1.6}
        ax.legend(handles, shown, **(style | kwargs))


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _moving_mean(values: Sequence[float], half: int) -> list[float]:
    means = []
    for i in range(len(values)):
        window = [v for v in values[max(0, i - half) : i + half + 1] if not math.isnan(v)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means
