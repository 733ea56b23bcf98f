"""The charts of a report: no label lies on another, and the dark ones have no dark ink and no white paper."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from synthetic import write_run

from prune_opd.track.plotting import DARK, STYLE, Chart, drawn, png
from prune_opd.track.report_compare import comparison_charts
from prune_opd.track.report_data import load_runs
from prune_opd.track.report_plots import run_charts

TOUCH = 1.5  # pixels that two labels may share: their boxes are larger than what is drawn


@pytest.fixture(scope="module")
def charts(tmp_path_factory: pytest.TempPathFactory) -> list[Chart]:
    folder = tmp_path_factory.mktemp("charts")
    runs = [write_run(folder / "a", steps=12), write_run(folder / "b", steps=12, strategy="topd", seed=1)]
    first, second = load_runs(runs)
    return [*run_charts(first), *comparison_charts([first, second])]


def beyond(figure: Figure) -> set[Text]:
    """The labels of ticks outside of what an axis shows: they exist and are not drawn."""
    found = set()
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low <= tick.get_loc() <= high:
                found |= {tick.label1, tick.label2}
    return found


def test_no_label_of_a_chart_lies_on_another(charts: list[Chart]) -> None:
    found = []
    for chart in charts:
        with mpl.rc_context(fname=STYLE):
            figure = drawn(chart)
            renderer = FigureCanvasAgg(figure).get_renderer()
            figure.draw(renderer)
        hidden = beyond(figure)
        texts = [one for one in figure.findobj(Text) if one.get_visible() and one.get_text().strip()]
        texts = [text for text in texts if text not in hidden]
        boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
        inside = [(name, box) for name, box in boxes if box.width and figure.bbox.overlaps(box)]
        for (name, box), (other, beside) in itertools.combinations(inside, 2):
            wide = min(box.x1, beside.x1) - max(box.x0, beside.x0)
            high = min(box.y1, beside.y1) - max(box.y0, beside.y0)
            if min(wide, high) > TOUCH:
                found.append(f"{chart.title}: {name!r} and {other!r}")
    assert not found, "\n".join(found)
    assert len(charts) > 15


def test_every_text_is_one_that_people_read(charts: list[Chart]) -> None:
    for chart in charts:
        with mpl.rc_context(fname=STYLE):
            figure = drawn(chart)
            figure.draw_without_rendering()
        assert not [text.get_text() for text in figure.findobj(Text) if "\\math" in text.get_text()], chart.title


def test_a_dark_chart_has_dark_paper_and_light_ink(charts: list[Chart]) -> None:
    for chart in charts[:3]:
        light, dark = (np.asarray(Image.open(io.BytesIO(png(chart, dark))).convert("RGB")) for dark in (False, True))
        assert light.shape == dark.shape
        assert tuple(light[2, 2]) == (255, 255, 255)
        assert tuple(dark[2, 2]) == tuple(mpl.colors.to_rgb(DARK["#ffffff"])[i] * 255 for i in range(3))
        assert (dark.mean(axis=2) > 245).mean() < 0.005, chart.title  # no white areas are left
        assert (dark.mean(axis=2) > 140).any()


def test_the_page_shows_the_one_that_fits_the_readers_colours(tmp_path: Path) -> None:
    from prune_opd.track.report_page import grid

    run = load_runs([write_run(tmp_path / "a", steps=3)])[0]
    page = grid(run_charts(run)[:1])
    assert '<source media="(prefers-color-scheme: dark)" srcset="data:image/png' in page
    assert page.count("data:image/png") == 2
