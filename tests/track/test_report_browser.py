"""The report in a real browser: its controls work, nothing is fetched, and nothing that a model wrote is run."""

import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, why_not
from PIL import Image
from synthetic import SCRIPT, TEXT, sample_record

from prune_opd.track.plotting import DARK
from prune_opd.track.report_page import write_page

SHOTS = Path(__file__).resolve().parents[2] / "build" / "screenshots"

reason = why_not()
if reason:
    print(f"\ntests/track/test_report_browser.py is skipped: {reason}", file=sys.__stderr__)
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

STOPPED = sample_record(12, "stopped")  # of the run "prune", but for what is planted


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, comparison: Path) -> Iterator[Browser]:
    """The comparison of two runs, just opened; whatever a test does with it must leave the console empty."""
    browser.open(comparison.as_uri())
    yield browser
    assert browser.problems() == []


def text(page: Browser, selector: str) -> list[str]:
    found: list[str] = page.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")
    return found


def to_stopped_response(page: Browser) -> None:
    page.click('[data-part="text"]')
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown"):  # steps 1, 6, 12; three responses each
        page.press(key)


def test_every_chart_is_drawn_and_opens_large(page: Browser) -> None:
    sizes = page.evaluate("[...document.querySelectorAll('figure img')].map(i => i.naturalWidth)")
    assert len(sizes) > 30 and min(sizes) > 900
    page.click("figure img", 3)
    assert (
        page.evaluate("document.querySelector('dialog').open && document.querySelector('dialog img').naturalWidth")
        > 900
    )
    assert text(page, "dialog h3") == [page.evaluate("document.querySelectorAll('figure img')[3].alt")]
    page.screenshot(SHOTS / "chart.png")
    page.press("Escape")
    assert not page.evaluate("document.querySelector('dialog').open")
    page.click("details summary")
    assert TEXT in re.sub(r"\s+", " ", text(page, "details[open] pre")[0])


def test_the_page_fits_its_window(page: Browser) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    page.screenshot(SHOTS / "report.png", whole=True)


def test_a_dark_chart_has_dark_paper_and_light_ink(page: Browser) -> None:
    light, dark = (chart_pixels(page, scheme) for scheme in ("light", "dark"))
    page.colour_scheme("light")
    assert tuple(light[20, 20]) == (255, 255, 255)
    assert tuple(dark[20, 20]) == tuple(int(DARK["#ffffff"][i : i + 2], 16) for i in (1, 3, 5))
    assert (light.mean(axis=2) > 245).mean() > 0.5 and (dark.mean(axis=2) > 245).mean() < 0.005
    assert (light.mean(axis=2) < 110).any() and (dark.mean(axis=2) > 140).any()


def chart_pixels(page: Browser, scheme: str) -> np.ndarray:
    page.colour_scheme(scheme)
    return np.asarray(Image.open(io.BytesIO(page.page.locator("figure img").first.screenshot())).convert("RGB"))


def test_steps_and_responses_are_chosen_with_clicks_and_keys(page: Browser) -> None:
    def chosen() -> tuple[str, str]:
        selected = text(page, '.responses [aria-selected="true"]')
        assert len(selected) == 1
        return page.evaluate("document.querySelector('[data-part=step]').value"), selected[0].split(" ·")[0]

    assert chosen() == ("1", "row 0")
    page.click(".responses button", 1)
    assert chosen() == ("1", "row 5")
    page.press("ArrowRight")
    page.press("ArrowDown")
    page.press("ArrowDown")
    page.press("ArrowDown")  # beyond the last one
    assert chosen() == ("6", "row 9")
    page.press("ArrowUp")
    page.press("ArrowLeft")
    assert chosen() == ("1", "row 0")
    page.click('[data-part="next"]')
    page.click('[data-part="next"]')
    assert chosen() == ("12", "row 0")
    page.choose('[data-part="run"]', "1")
    assert chosen()[0] in ("1", "8") and text(page, ".text .prompt")[0].endswith("finished \n")


def test_a_token_shows_its_overlap_its_weight_and_its_event(page: Browser) -> None:
    to_stopped_response(page)
    tokens: list[dict[str, Any]] = page.evaluate(
        "[...document.querySelectorAll('.token')].map(t => ({title: t.title, event: t.classList.contains('event'),"
        " after: t.classList.contains('after'), alpha: +getComputedStyle(t).backgroundColor.split(/[,)]/)[3]}))"
    )
    for i, overlap in enumerate(STOPPED["overlap"]):
        assert f"overlap {overlap:.2f} · weight {STOPPED['weight'][i]:.2f}" in tokens[i]["title"]
        assert tokens[i]["event"] == (i in STOPPED["events"]) == ("drift event" in tokens[i]["title"])
        assert tokens[i]["after"] == (i >= 31)
        assert tokens[i]["alpha"] == pytest.approx(0.85 * (1 - overlap), abs=0.01)
    page.press("e")
    page.press("e")
    assert page.evaluate("document.querySelector('.chosen').dataset.index") == "30"
    assert "“ word30” · token 31 of" in text(page, ".detail")[0] and "overlap 0.25" in text(page, ".detail")[0]
    page.click(".token", 3)
    assert "“ word3” · token 4 of" in text(page, ".detail")[0]
    page.choose('[data-part="colour"]', "weight")
    alphas = page.evaluate(
        "[3, 10, 35].map(i => document.querySelectorAll('.token')[i])"
        ".map(token => getComputedStyle(token).backgroundColor).map(colour => +colour.split(/[,)]/)[3])"
    )
    assert alphas == pytest.approx([0.85, 0.425, 0], abs=0.01)


def test_the_cut_and_the_end_of_the_window_are_marked(page: Browser) -> None:
    to_stopped_response(page)
    page.screenshot(SHOTS / "viewer.png")
    page.colour_scheme("dark")
    page.screenshot(SHOTS / "viewer-dark.png")
    page.colour_scheme("light")
    assert text(page, ".text .cut") == ["✂ reliability 0 after 31 tokens", "■ stopped in flight, 3 tokens dropped"]
    assert page.evaluate("document.querySelector('.text .cut').previousSibling.dataset.index") == "30"
    page.press("ArrowUp")
    assert text(page, ".text .cut") == ["▐ horizon of 64 tokens"]
    page.press("ArrowUp")
    assert text(page, ".text .cut") == ["✓ ended by itself"]


def test_responses_are_found_by_their_ending_and_by_their_text(page: Browser) -> None:
    page.choose('[data-part="ending"]', "stopped")
    assert [button.split(" ·")[0] for button in text(page, ".responses button")] == ["row 9"]
    page.choose('[data-part="ending"]', "any")
    page.choose('[data-part="search"]', "D17 WO")  # over two tokens
    assert text(page, ".found") == [" word17", " word18"]
    page.choose('[data-part="search"]', "prompt of step 6, horizon")
    assert text(page, '[data-part="step"] option') == ["6"] and len(text(page, ".responses button")) == 1
    page.choose('[data-part="search"]', "nowhere to be found")
    assert text(page, ".token") == [] and text(page, ".detail") == ["No sampled response matches."]
    page.choose('[data-part="search"]', "")
    assert len(text(page, ".responses button")) == 3


def test_what_a_model_wrote_is_shown_and_never_run(page: Browser) -> None:
    to_stopped_response(page)
    assert TEXT in "".join(text(page, ".token")) and TEXT in text(page, ".text .prompt")[0]
    assert SCRIPT in text(page, '[data-part="run"] option')[0]
    assert page.evaluate("typeof window.planted") == "undefined"
    assert page.evaluate("document.querySelectorAll('.viewer img, .viewer script').length") == 0


def test_a_script_that_got_into_a_page_all_the_same_is_not_run_and_a_request_not_made(
    browser: Browser, tmp_path: Path
) -> None:
    """This shows that the other tests would notice a script or a request."""
    write_page(
        "planted", [SCRIPT, '<img src="http://127.0.0.1:9/a.png" onerror="window.planted = 1">'], tmp_path / "page.html"
    )
    browser.open((tmp_path / "page.html").as_uri())
    assert browser.evaluate("typeof window.planted") == "undefined"
    assert sum("Content Security Policy" in problem for problem in browser.problems()) >= 2
    (tmp_path / "bare.html").write_text('<img src="http://127.0.0.1:9/a.png"><script>nothing.there; </script>')
    browser.open((tmp_path / "bare.html").as_uri())
    heard = " ".join(browser.problems())
    assert "request: http://127.0.0.1:9/a.png" in heard and "exception" in heard
