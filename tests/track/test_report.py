"""The report: self-contained, safe to open, and there for whatever a run measured."""

import json
import re
import warnings
from base64 import b64decode
from contextlib import closing
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from synthetic import KEY, PASSWORD, SCRIPT, TEXT, VALUE, evaluation_record, sample_record, step_record, write_run
from typer.testing import CliRunner

from prune_opd.cli.main import app
from prune_opd.errors import UserError
from prune_opd.track.metrics import FILE_NAME, MetricsLog
from prune_opd.track.report import write_report
from prune_opd.track.report_data import load_run, load_runs
from prune_opd.track.report_viewer import viewer

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
        if tag not in ("meta", "img", "source", "br", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def rollouts(text: str) -> list[dict[str, Any]]:
    """The viewer's data, as the browser reads it."""
    block = re.search(r'<script type="application/json" id="rollouts">(.*?)</script>', text, re.DOTALL)
    assert block is not None
    found: list[dict[str, Any]] = json.loads(block[1])
    return found


@pytest.fixture(scope="module")
def several(comparison: Path) -> str:
    assert comparison.with_suffix(".png").read_bytes().startswith(PNG_HEAD)
    return comparison.read_text(encoding="utf-8")


def test_the_report_needs_nothing_but_itself(single: str, several: str) -> None:
    for text in (single, several):
        page = Page(text)
        pictures = page.tags.count("img")
        assert sum(link.startswith("data:image/svg+xml;base64,") for link in page.links) == pictures
        assert {link for link in page.links if not link.startswith("data:image/svg+xml")} == {"data:,", "#viewer"}
        assert not re.search(r"url\(|@import|https?://|fetch\(|XMLHttpRequest|WebSocket", text)
        assert page.open == []


def test_text_of_the_run_and_of_its_models_cannot_become_markup(single: str, several: str) -> None:
    for text in (single, several):
        page = Page(text)
        assert page.tags.count("script") == 2, "a block of data and the page's own script"
        assert SCRIPT in page.text and f"student: {TEXT}" in re.sub(r"\s+", " ", page.text)
        assert TEXT in "".join(rollouts(text)[0]["samples"][0]["tokens"])
        for link in page.links:
            if link.startswith("data:image/svg+xml;base64,"):  # a picture whose names became markup would not parse
                tags = {
                    element.tag.rpartition("}")[2] for element in ElementTree.fromstring(b64decode(link[26:])).iter()
                }
                assert "path" in tags and not tags & {"script", "foreignObject", "a", "iframe"}


def test_secrets_of_the_environment_and_of_known_shapes_are_masked(single: str, several: str, runs: list[Path]) -> None:
    assert PASSWORD in (runs[0] / "config.yaml").read_text()
    for text in (single, several):
        whole = text + "".join(token for run in rollouts(text) for s in run["samples"] for token in s["tokens"])
        assert not [secret for secret in (KEY, VALUE, PASSWORD) if secret in whole]
        masked = "".join(rollouts(text)[0]["samples"][0]["tokens"])
        assert masked.endswith(f" {'•' * len(KEY)} {'•' * len(VALUE)} end")


def test_a_single_report_has_the_totals_and_every_chart(single: str, runs: list[Path]) -> None:
    page = Page(single)
    assert page.tags.count("img") == page.tags.count("figcaption") == 18
    for text in (
        "tokens at the full horizon",
        "(estimated)",
        "rollout",
        "final horizon",
        "full reverse KL to the teacher",
        "rows padded to the longest",
        "(step 0 → 12)",
    ):
        assert text in page.text, text
    assert "Overlap is not success: accuracy is beside it." in page.text
    pictures = [runs[0] / "report.png", *sorted((runs[0] / "report").iterdir())]
    assert len(pictures) == 19 and pictures[5].name == "05-overlap-by-position-over-training.png"
    assert all(picture.read_bytes().startswith(PNG_HEAD) for picture in pictures)


def test_several_runs_are_compared_and_then_shown_one_by_one(several: str) -> None:
    page = Page(several)
    assert "Comparison of 2 Prune-OPD runs" in page.text
    assert page.tags.count("h2") == 3 and page.tags.count("details") == 2
    assert "Accuracy over generated tokens: ledger" in page.text and "Where the time went" in page.text


def settings_table(text: str) -> dict[str, list[str]]:
    """The rows of the comparison's first table, by setting."""
    table = text[text.index("settings that differ") :].partition("</table>")[0]
    cells = [[unescape(cell) for cell in re.findall("<t[hd]>(.*?)</t[hd]>", row)] for row in table.split("<tr>")[1:]]
    return {name: values for name, *values in cells}


@pytest.mark.usefixtures("first_chart")
def test_a_comparison_begins_with_the_settings_that_differ_and_no_others(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", name="one", steps=2, evaluate_every=0, student="models/" + 80 * "x"),
        write_run(tmp_path / "b", name="two", steps=2, evaluate_every=0, strategy="full"),
        write_run(tmp_path / "c", name="three", steps=2, evaluate_every=0),
    ]
    (runs[2] / "config.yaml").unlink()
    write_report(runs, tmp_path / "comparison.html")
    text = (tmp_path / "comparison.html").read_text()
    rows = settings_table(text)
    assert set(rows) == {"student", "gate", "horizon.strategy", "horizon.init_len"}
    assert rows["horizon.strategy"] == ["prune", "full", "–"]
    assert rows["gate"][1:] == ["null", "–"] and rows["gate"][0].startswith("{metric: overlap, k: 16")
    assert len(rows["student"][0]) == 60 and rows["student"][0].endswith("…")
    assert (
        text.index("settings that differ") < text.index('class="compare"', text.index("</table>")) < text.index("<img")
    )


@pytest.mark.usefixtures("first_chart")
def test_runs_with_the_same_settings_say_so(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, name=name, steps=2, evaluate_every=0) for name in ("a", "b")]
    write_report(runs, tmp_path / "comparison.html")
    assert "No setting of these runs is known to differ." in (tmp_path / "comparison.html").read_text()


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    pair = [write_run(tmp_path / "a", steps=2, evaluate_every=0), write_run(tmp_path / "b", steps=2, evaluate_every=0)]
    assert [run.name for run in load_runs(pair)] == ["ledger-prune (a)", "ledger-prune (b)"]


@pytest.mark.parametrize(
    "case", ["no evaluation", "one step", "evaluation only", "no config", "damaged config", "odd config", "diverged"]
)
def test_a_run_with_little_to_show_still_has_a_report(tmp_path: Path, case: str) -> None:
    run = write_run(tmp_path, steps=1 if case == "one step" else 3, evaluate_every=0)
    if case == "no config":
        (run / "config.yaml").unlink()
    elif case == "damaged config":
        (run / "config.yaml").write_text("name: [\n")
    elif case == "odd config":
        (run / "config.yaml").write_text("name: 0x_\n")
    elif case == "evaluation only":
        with closing(MetricsLog(run / FILE_NAME, keep_through=None)) as log:
            log.write(evaluation_record(0, 3))
    elif case == "diverged":
        nothing = {"loss": float("nan"), "grad_norm": float("inf"), "overlap_by_position": None, "overlap": None}
        with closing(MetricsLog(run / FILE_NAME, keep_through=None)) as log:
            log.write({**step_record(1, 2), "overlap_by_position": [None] * 16})
            log.write({**step_record(2, 2), **nothing})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report([run], run / "report.html")
    page = Page((run / "report.html").read_text())
    assert ("no evaluation" in page.text) == (case != "evaluation only")
    assert "img" in page.tags


@pytest.mark.usefixtures("first_chart")
def test_a_report_says_how_many_answers_could_be_read_and_notes_where_few_could(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=3, evaluate_every=0)
    first, last = evaluation_record(0, 3), evaluation_record(3, 3)
    with closing(MetricsLog(run / FILE_NAME, keep_through=3)) as log:
        log.write(first | {"eval_gsm": 0.0, "eval_gsm_readable": 40 / 48, "eval_gsm_answers": 48})
        log.write(last | {"eval_gsm": 0.0, "eval_gsm_readable": 3 / 48, "eval_gsm_answers": 48})
    write_report([run], run / "report.html")
    page = Page((run / "report.html").read_text())
    assert "200 of 256 → 250 of 256" in page.text and "40 of 48 → 3 of 48" in page.text
    assert page.text.count("could be read") == 1 and "only 3 of 48 answers to gsm could be read" in page.text


@pytest.mark.usefixtures("first_chart")
def test_a_report_of_damaged_or_doubled_files_says_so_in_the_page_and_on_the_terminal(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path / "run", steps=6, evaluate_every=0)
    lines = (run / FILE_NAME).read_text().splitlines(keepends=True)
    (run / FILE_NAME).write_text("".join([*lines, lines[2].replace('"step": 3', '"step": 4'), lines[5][:30]]))
    responses = (run / "samples.jsonl").read_text()
    (run / "samples.jsonl").write_text(responses + responses[:50])
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code == 0, done.output
    said = [line for line in done.output.splitlines() if line.startswith("note: ")]
    page = Page((run / "report.html").read_text()).text
    expected = ("metrics.jsonl: the last line is cut off", "has step 4 more than once", "samples.jsonl: the last line")
    assert len(said) == 3 and all(any(text in line for line in said) and text in page for text in expected)
    assert [record["step"] for record in load_run(run).steps] == [1, 2, 3, 5, 6]


def test_a_file_that_two_processes_wrote_from_its_start_has_no_report(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=3, evaluate_every=0)
    (run / FILE_NAME).write_text("".join(f'{{"step": {s}, "loss": {loss}}}\n' for s in (1, 2) for loss in (0.5, 0.25)))
    with pytest.raises(
        UserError, match=r"has steps 1-2 more than once, with different values: they are left out.*step$"
    ):
        write_report([run], run / "report.html")


def test_a_long_run_is_drawn_with_a_moving_mean_and_grouped_bars(tmp_path: Path) -> None:
    write_report([write_run(tmp_path, steps=150, evaluate_every=0)], tmp_path / "report.html")
    assert (tmp_path / "report.png").stat().st_size > 50_000


def test_the_viewer_leaves_out_steps_evenly_where_there_are_too_many_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(write_run(tmp_path, steps=2, evaluate_every=0))
    run = replace(run, samples=[sample_record(step, "horizon") for step in range(1, 41)])
    assert {s["step"] for s in rollouts(viewer([run]))[0]["samples"]} == set(range(1, 41))
    monkeypatch.setattr("prune_opd.track.report_viewer._ROOM", 15 * len(json.dumps(sample_record(40, "horizon"))))
    assert [s["step"] for s in rollouts(viewer([run]))[0]["samples"]] == list(range(1, 41, 3))
    assert "26 of 40 responses are left out" in viewer([run])


def test_a_run_without_samples_has_no_viewer(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=1, evaluate_every=0)
    (run / "samples.jsonl").unlink()
    assert viewer([load_run(run)]) == ""


def test_missing_or_empty_metrics_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        write_report([tmp_path], tmp_path / "report.html")
    (tmp_path / FILE_NAME).touch()
    with pytest.raises(UserError, match="no record yet"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(UserError, match="no run directory"):
        write_report([], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == [tmp_path / FILE_NAME]
