"""An HTML page: one file that needs nothing else. Its security policy loads nothing and runs our script alone."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from prune_opd.track.plotting import Chart, pictures


def asset(name: str) -> str:
    """A file of the page's: its frame, its style, its script."""
    return Path(__file__).with_name("assets").joinpath(name).read_text(encoding="utf-8")


def write_page(title: str, body: list[str], out: Path) -> None:
    """Write a page from its parts in HTML. The browser fetches nothing and runs no script but ours."""
    style, script = asset("report.css"), asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    values = {"policy": policy, "title": escape(title), "style": style, "body": "\n".join(body), "script": script}
    page = asset("page.html").format(**values)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")


def grid(charts: Sequence[Chart], folder: Path | None = None) -> str:
    """The charts as cards side by side. folder: gets each chart as a PNG too, numbered in order."""
    cards = []
    for place, chart in enumerate(charts, start=1):
        svg, png = pictures(chart, with_png=folder is not None)
        if folder is not None and png is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{place:02d}-{_slug(chart.title)}.png").write_bytes(png)
        title, source = escape(chart.title), base64.b64encode(svg.encode()).decode("ascii")
        cards.append(
            f'<figure><h3>{title}</h3><img alt="{title}" src="data:image/svg+xml;base64,{source}">'
            f"<figcaption>{escape(chart.caption)}</figcaption></figure>"
        )
    return '<div class="grid">' + "".join(cards) + "</div>"


def _slug(title: str) -> str:
    """A title as a file name, without its unit."""
    return re.sub(r"[^a-z0-9]+", "-", title.partition("[")[0].lower()).strip("-")
