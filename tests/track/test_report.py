"""The report: self-contained, safe to open, and there for whatever a run measured."""

import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic import evaluation_record, step_record, write_run

from prune_opd.errors import UserError
from prune_opd.track.metrics import FILE_NAME, MetricsLog
from prune_opd.track.report import write_report

PNG_HEAD = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """Collects tags and attributes, and checks that what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    planted = "</pre><script>alert('student')</script>"
    return [
        write_run(folder / "prune", steps=12, evaluate_every=4, name="<script>alert(1)</script>", student=planted),
        write_run(folder / "full", steps=8, evaluate_every=4, strategy="full", name="$full_ & 'quoted'"),
    ]


@pytest.fixture(scope="module")
def single(runs: list[Path]) -> str:
    write_report(runs[:1], runs[0] / "report.html")
    return (runs[0] / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def several(runs: list[Path]) -> str:
    out = runs[0].parent / "new" / "comparison.html"
    write_report(runs, out)
    assert out.with_suffix(".png").read_bytes().startswith(PNG_HEAD)
    return out.read_text(encoding="utf-8")


def test_the_report_needs_nothing_but_itself(single: str, several: str) -> None:
    for text in (single, several):
        page = Page(text)
        assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
        assert not re.search(r"url\(|@import|https?://", text)
        assert page.open == []


def test_text_of_the_configuration_cannot_become_markup(single: str, several: str) -> None:
    for text in (single, several):
        page = Page(text)
        assert "script" not in page.tags
        assert "<script>alert(1)</script>" in page.text and "</pre><script>alert('student')</script>" in page.text


def test_a_single_report_has_the_totals_and_every_chart(single: str, runs: list[Path]) -> None:
    page = Page(single)
    assert page.tags.count("img") == page.tags.count("figcaption") == 12
    for text in (
        "tokens at the full horizon",
        "(estimated)",
        "rollout",
        "final horizon",
        "rows padded to the longest",
        "(step 0 → 12)",
    ):
        assert text in page.text, text
    assert "Overlap is not success: accuracy is beside it." in page.text
    assert (runs[0] / "report.png").read_bytes().startswith(PNG_HEAD)


def test_several_runs_are_compared_and_then_shown_one_by_one(several: str) -> None:
    page = Page(several)
    assert "Comparison of 2 Prune-OPD runs" in page.text
    assert page.tags.count("h2") == 2 and page.tags.count("details") == 2
    assert "Accuracy over generated tokens: ledger" in page.text and "Where the time went" in page.text


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    pair = [write_run(tmp_path / "a", steps=2, evaluate_every=0), write_run(tmp_path / "b", steps=2, evaluate_every=0)]
    write_report(pair, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "ledger-prune (a)" in text and "ledger-prune (b)" in text


@pytest.mark.parametrize(
    "case", ["no evaluation", "one step", "evaluation only", "no config", "damaged config", "diverged"]
)
def test_a_run_with_little_to_show_still_has_a_report(tmp_path: Path, case: str) -> None:
    run = write_run(tmp_path, steps=1 if case == "one step" else 3, evaluate_every=0)
    if case == "no config":
        (run / "config.yaml").unlink()
    elif case == "damaged config":
        (run / "config.yaml").write_text("name: [\n")
    elif case == "evaluation only":
        with MetricsLog(run / FILE_NAME, keep_through=None) as log:
            log.write(evaluation_record(0, 3))
    elif case == "diverged":
        nothing = {"loss": float("nan"), "grad_norm": float("inf"), "overlap_by_position": None, "overlap": None}
        with MetricsLog(run / FILE_NAME, keep_through=None) as log:
            log.write({**step_record(1, 2), "overlap_by_position": [None] * 16})
            log.write({**step_record(2, 2), **nothing})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report([run], run / "report.html")
    page = Page((run / "report.html").read_text())
    assert ("no evaluation" in page.text) == (case != "evaluation only")
    assert "img" in page.tags


def test_a_long_run_is_drawn_with_a_moving_mean_and_grouped_bars(tmp_path: Path) -> None:
    write_report([write_run(tmp_path, steps=150, evaluate_every=0)], tmp_path / "report.html")
    assert (tmp_path / "report.png").stat().st_size > 50_000


def test_missing_or_empty_metrics_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        write_report([tmp_path], tmp_path / "report.html")
    (tmp_path / FILE_NAME).touch()
    with pytest.raises(UserError, match="no record yet"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(UserError, match="no run directory"):
        write_report([], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == [tmp_path / FILE_NAME]
