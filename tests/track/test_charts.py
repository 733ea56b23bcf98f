"""The charts of a report: no label lies on another, and paper and ink follow the reader's colours."""

from __future__ import annotations

import io
import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from synthetic import write_run

from prune_opd.track.plotting import DARK, STYLE, Chart, drawn, pictures
from prune_opd.track.report_compare import comparison_charts
from prune_opd.track.report_data import load_runs
from prune_opd.track.report_page import grid
from prune_opd.track.report_plots import run_charts

TOUCH = 1.5  # pixels that two labels may share: their boxes are larger than what is drawn


@pytest.fixture(scope="module")
def charts(tmp_path_factory: pytest.TempPathFactory) -> list[Chart]:
    folder = tmp_path_factory.mktemp("charts")
    runs = [write_run(folder / "a", steps=12), write_run(folder / "b", steps=12, strategy="topd", seed=1)]
    first, second = load_runs(runs)
    return [*run_charts(first), *comparison_charts([first, second])]


@pytest.fixture(scope="module")
def figures(charts: list[Chart]) -> list[tuple[str, Figure]]:
    """Each chart's title, and the chart as it was drawn."""
    found = []
    for chart in charts:
        with mpl.rc_context(fname=STYLE):
            figure = drawn(chart)
            figure.draw(FigureCanvasAgg(figure).get_renderer())
        found.append((chart.title, figure))
    return found


def beyond(figure: Figure) -> set[Text]:
    """The labels of ticks outside of what an axis shows: they exist and are not drawn."""
    found = set()
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low <= tick.get_loc() <= high:
                found |= {tick.label1, tick.label2}
    return found


def test_no_label_of_a_chart_lies_on_another(figures: list[tuple[str, Figure]]) -> None:
    found = []
    for title, figure in figures:
        renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
        hidden = beyond(figure)
        texts = [one for one in figure.findobj(Text) if one.get_visible() and one.get_text().strip()]
        texts = [text for text in texts if text not in hidden]
        boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
        inside = [(name, box) for name, box in boxes if box.width and figure.bbox.overlaps(box)]
        for (name, box), (other, beside) in itertools.combinations(inside, 2):
            wide = min(box.x1, beside.x1) - max(box.x0, beside.x0)
            high = min(box.y1, beside.y1) - max(box.y0, beside.y0)
            if min(wide, high) > TOUCH:
                found.append(f"{title}: {name!r} and {other!r}")
    assert not found, "\n".join(found)
    assert len(figures) > 15


def test_every_text_is_one_that_people_read(figures: list[tuple[str, Figure]]) -> None:
    for title, figure in figures:
        assert not [text.get_text() for text in figure.findobj(Text) if "\\math" in text.get_text()], title


def test_paper_and_ink_of_a_chart_follow_the_readers_colours_and_nothing_else_does(charts: list[Chart]) -> None:
    for chart in charts:
        svg, _ = pictures(chart, with_png=False)
        tree = ElementTree.fromstring(svg)  # whole, and safe in a page
        assert "script" not in svg and "http" not in svg.replace("http://www.w3.org/", "")
        style = next(tree.iter("{http://www.w3.org/2000/svg}style")).text or ""
        light, dark = style.split("@media(prefers-color-scheme:dark)")
        for number, (colour, other) in enumerate(DARK.items()):
            assert f"--c{number}:{colour};" in light and f"--c{number}:{other};" in dark
        drawn_colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg))
        assert not drawn_colours & DARK.keys(), chart.title
        ramp = f"var(--c{list(DARK).index('#08306b')})"  # of late steps: the one colour of data that has a dark form
        assert drawn_colours or "<image" in svg or ramp in svg, chart.title
        assert "fill: var(--c2)" in svg  # the labels of ticks are muted ink


def test_the_two_pictures_of_a_chart_are_alike_and_the_layout_is_made_once(charts: list[Chart]) -> None:
    svg, png = pictures(charts[0], with_png=True)
    assert png is not None
    width, height = Image.open(io.BytesIO(png)).size
    assert f'width="{width}" height="{height}"' in svg[:500]
    paper = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))[2, 2]
    assert tuple(paper) == (255, 255, 255)


def test_the_page_has_one_picture_for_all_readers(tmp_path: Path) -> None:
    run = load_runs([write_run(tmp_path / "a", steps=3)])[0]
    page = grid(run_charts(run)[:1])
    assert page.count("data:image/svg+xml;base64,") == page.count("<img") == 1
