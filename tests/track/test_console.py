"""The console: control codes for terminals only, and the same figures everywhere."""

import io
import re
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
from rich.console import Console
from synthetic import evaluation_record, step_record

from prune_opd.process import progress
from prune_opd.track.console import RunConsole, duration, summary_table, unreadable_notes
from prune_opd.track.moving import shown as following

ESCAPE = "\x1b"


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def show(file: TextIO, name: str = "run", total: int = 4) -> None:
    steps = [step_record(s, total) for s in range(1, total + 1)]
    evaluations = [evaluation_record(0, total), evaluation_record(total, total)]
    with closing(RunConsole(name, total, 1, file=file)) as console:
        console.evaluation(evaluations[0])
        for record in steps:
            console.step(record)
        console.note("checkpoint [written] to /runs/a")
        console.evaluation(evaluations[1])
        console.summary(steps, evaluations)


def shown(file: io.StringIO, name: str = "run") -> str:
    show(file, name)
    return file.getvalue()


@pytest.fixture(autouse=True)
def terminal_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")


def test_plain_output_has_no_control_codes_even_when_colour_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = shown(io.StringIO())
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)


def test_plain_output_is_one_line_a_step() -> None:
    lines = [line for line in shown(io.StringIO()).splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    for figure in ("horizon", "overlap", "events", "loss", "saved", "tokens/s", "rollout", "eta"):
        assert all(figure in line for line in lines), figure


def test_notes_and_evaluations_are_shown_as_written() -> None:
    text = shown(io.StringIO())
    assert "checkpoint [written] to /runs/a" in text
    assert re.search(r"evaluation after step 4:  ledger \d+\.\d%", text)


def evaluation_lines(record: dict[str, Any]) -> list[str]:
    file = io.StringIO()
    with closing(RunConsole("run", 4, 1, file=file)) as console:
        console.evaluation(record)
    return file.getvalue().splitlines()


def test_an_accuracy_says_how_many_answers_could_be_read() -> None:
    (line,) = evaluation_lines(evaluation_record(4, 4))
    assert re.search(r"ledger \d+\.\d% \+- \d\.\d% \(250 of 256 answers readable\)", line)


def test_a_line_from_before_answers_were_counted_is_shown_without() -> None:
    (line,) = evaluation_lines({"step": 0, "eval_gsm": 0.0})
    assert "gsm 0.0%" in line and "readable" not in line


@pytest.mark.parametrize(("readable", "noted"), [(23, True), (24, False)])
def test_fewer_than_half_of_the_answers_readable_is_told_with_the_setting(readable: int, noted: bool) -> None:
    record = {"step": 0, "eval_gsm": 0.0, "eval_gsm_readable": readable / 48, "eval_gsm_answers": 48}
    line, *notes = evaluation_lines(record)
    assert f"gsm 0.0% ({readable} of 48 answers readable)" in line
    assert len(notes) == noted
    for note in notes:
        assert "only 23 of 48 answers to gsm could be read" in note and "evaluation.extract" in note
        assert "box_or_last_number" in note and "regex:PATTERN" in note


def test_the_ledger_has_no_setting_to_be_told_of() -> None:
    assert unreadable_notes("ledger", (0, 48)) == []


def test_a_terminal_gets_a_live_display_that_shows_notes_above_it() -> None:
    text = shown(Terminal(), name="run [/weird] [bold]")
    assert ESCAPE in text
    assert "run [/weird] [bold]" in text
    assert "checkpoint [written] to /runs/a" in text


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert ESCAPE not in shown(Terminal())


def test_an_ascii_log_file_does_not_end_the_run() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    show(file, name="späti")
    assert b"tokens saved" in raw.getvalue()


def test_a_step_line_survives_a_record_with_step_only() -> None:
    file = io.StringIO()
    with closing(RunConsole("run", 3, 1, file=file)) as console:
        console.step({"step": 1})
    assert file.getvalue() == "step 1/3  eta ?\n"


def test_saved_tokens_are_cumulative_over_a_resume() -> None:
    half = {"step": 1, "tokens_generated": 50, "tokens_full": 100}
    none = {"step": 2, "tokens_generated": 300, "tokens_full": 300}
    file = io.StringIO()
    with closing(RunConsole("run", 2, 2, history=[half], file=file)) as console:
        console.step(none)
    assert "saved 12.5%" in file.getvalue()


def test_eta_is_the_mean_step_time_of_what_remains() -> None:
    file = io.StringIO()
    with closing(RunConsole("run", 11, 1, file=file)) as console:
        console.step({"step": 1, "time_step": 30.0})
    assert "eta 5 m 00 s" in file.getvalue()


def test_summary_table_tells_estimates_as_such() -> None:
    page = Console(file=io.StringIO(), width=120)
    with page.capture() as captured:
        page.print(summary_table([step_record(s, 4) for s in range(1, 5)], [evaluation_record(0, 4)]))
    text = captured.get()
    assert re.search(r"tokens saved .*\(estimated\)", text)
    assert re.search(r"padding +.*0\.2% of the tokens \(rows padded to the longest: \d+\.\d%\)", text)
    assert re.search(r"answers readable, ledger.* 200 of 256 ", text)
    assert "step 0 only" in text and "final horizon" in text and "rollout" in text


def test_summary_table_of_nothing_is_a_table() -> None:
    assert summary_table([], []).row_count > 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.81, "9.8 s"), (59.99, "1 m 00 s"), (252, "4 m 12 s"), (11220, "3 h 07 m"), (float("nan"), "?")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_log_has_the_plain_lines_of_a_terminal_too(tmp_path: Path) -> None:
    steps = [step_record(s, 4) for s in range(1, 3)]
    with closing(RunConsole("run", 4, 1, file=Terminal(), log=tmp_path / "run.log")) as console:
        console.keep(["  1.0 s  starting vLLM"])
        console.step(steps[0])
        console.note("a note")
        console.step(steps[1])
        console.summary(steps, [])
    console.end_log()
    lines = (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()
    assert ESCAPE not in "".join(lines)
    assert [line[21:].split("  ")[0].strip() for line in lines] == [
        "",
        "step 1/4",
        "a note",
        "step 2/4",
        lines[-1][21:],
    ]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in lines)


@pytest.mark.parametrize(
    ("steps", "failed", "title"),
    [
        (4, False, "4 steps"),
        (2, False, "STOPPED after 2 of 4 steps, not finished"),
        (2, True, "FAILED after 2 of 4 steps"),
        (4, True, "FAILED after 4 of 4 steps"),
    ],
)
def test_a_summary_looks_like_success_only_where_it_is(steps: int, failed: bool, title: str) -> None:
    file = io.StringIO()
    with closing(RunConsole("run", 4, 1, file=file)) as console:
        console.summary([step_record(s, 4) for s in range(1, steps + 1)], [], failed)
    assert file.getvalue().splitlines()[0].strip() == title


def test_what_has_no_step_is_said_and_a_terminal_shows_every_phase() -> None:
    plain, terminal = io.StringIO(), Terminal()
    for file in (plain, terminal):
        with closing(RunConsole("run", 4, 1, file=file)) as console:
            for phase in ("rollout", "evaluation", "teacher"):
                console.phase(phase)
    assert plain.getvalue() == "evaluating …\n"
    assert "teacher" in terminal.getvalue()


def test_what_moves_within_a_phase_is_shown_on_a_terminal_and_now_and_then_in_plain_lines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now, asked = [0.0], [0]
    monkeypatch.setattr("prune_opd.track.moving.time", SimpleNamespace(monotonic=lambda: now[0]))
    plain, terminal = io.StringIO(), Terminal()

    def describe() -> str:
        asked[0] += 1
        return f"micro-batch {now[0]:.0f}/100"

    for file, looks in ((plain, 4), (terminal, 100)):
        now[0], asked[0] = 0.0, 0
        with closing(RunConsole("run", 4, 1, file=file, log=tmp_path / "log")) as console:
            console.phase("train")
            for second in range(100):
                now[0] = second
                progress(describe)
            console.phase("evaluation")
            progress(describe)
            now[0] += 31
            progress(describe)
        now[0] += 31
        progress(describe)  # nobody watches any more
        assert asked[0] == looks
    assert plain.getvalue().splitlines() == [
        "step 1/4  train: micro-batch 30/100",
        "step 1/4  train: micro-batch 60/100",
        "step 1/4  train: micro-batch 90/100",
        "evaluating …",
        "evaluation: micro-batch 130/100",
    ]
    assert "evaluation: micro-batch 130/100" in terminal.getvalue()


def test_a_command_shows_how_far_it_is_and_leaves_a_terminal_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("prune_opd.track.moving.time", SimpleNamespace(monotonic=lambda: now[0]))
    plain, terminal, silent = io.StringIO(), Terminal(), io.StringIO()
    for file in (plain, terminal, silent):
        with following("exporting", speaks=file is not silent, file=file):
            now[0] += 40
            progress(lambda: "3/7 MB")
            progress(lambda: "4/7 MB")
    assert plain.getvalue() == "exporting: 3/7 MB\n"
    assert terminal.getvalue() == f"{ESCAPE}[2Kexporting: 3/7 MB\r{ESCAPE}[2K"
    assert silent.getvalue() == ""
