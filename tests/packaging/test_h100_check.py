"""`make test-h100`: how it runs its steps, and its last result, which is in the repository."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from scripts import h100_check
from scripts.h100_check import RESULT, STEPS, run_step

DATED = r"^{} \(\d{{4}}-\d\d-\d\d \d\d:\d\d UTC, commit [0-9a-f]{{7,}}\+?\): "


def test_every_step_is_a_program() -> None:
    folder = Path(h100_check.__file__).parent / "h100"
    assert all((folder / f"{name}.py").is_file() for name in STEPS)


def test_a_step_that_fails_leaves_what_it_said_and_the_end_of_its_errors(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("print('three tensors')")
    (tmp_path / "bad.py").write_text("print('one tensor')\nraise RuntimeError('on the host')")
    assert run_step("good", tmp_path)[1][0] == "three tensors" and run_step("good", tmp_path)[0]
    passed, said = run_step("bad", tmp_path)
    assert not passed and said[0] == "one tensor" and said[-1] == "RuntimeError: on the host"


def test_the_report_has_date_commit_versions_and_verdicts_and_keeps_other_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report.txt"

    def check(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["h100_check.py", "--out", str(out), *arguments])
        return h100_check.main()

    monkeypatch.setattr(h100_check, "run_step", lambda name: (name != "engines", [f"{name} said this"]))
    assert check() == 1
    assert re.search(DATED.format("FAILED engines"), text := out.read_text(), re.MULTILINE)
    assert re.search(DATED.format("passed imports"), text, re.MULTILINE) and "  imports said this\n" in text
    assert "\n  torch 2." in text and "\n  fused-weight-gradient-mlp-cuda " in text
    monkeypatch.setattr(h100_check, "run_step", lambda name: (True, ["now it does"]))
    assert check("engines") == 0
    again = out.read_text()
    assert again == re.sub(r"FAILED (engines.*)\n  engines said this", r"passed \1\n  now it does", text)


def test_the_last_result_is_here_and_names_every_step() -> None:
    """Not that it passed: what has not is to be seen there."""
    text = RESULT.read_text(encoding="utf-8")
    assert all(re.search(DATED.format(f"(passed|FAILED) {name}"), text, re.MULTILINE) for name in STEPS)
    assert all(pin in text for pin in ("torch 2.13.0", "vllm 0.32.0", "megatron-core 0.16.1"))
