"""`make test-h100`: how it runs its steps, and its last result, which is in the repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts import h100_check
from scripts.h100_check import RESULT, STEPS, report, run_step


def test_every_step_is_a_program() -> None:
    folder = Path(h100_check.__file__).parent / "h100"
    assert all((folder / f"{name}.py").is_file() for name in STEPS)


def test_a_step_that_fails_leaves_what_it_said_and_the_end_of_its_errors(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("print('three tensors')")
    (tmp_path / "bad.py").write_text("print('one tensor')\nraise RuntimeError('on the host')")
    assert run_step("good", tmp_path)[1][0] == "three tensors" and run_step("good", tmp_path)[0]
    passed, said = run_step("bad", tmp_path)
    assert not passed and said[0] == "one tensor" and said[-1] == "RuntimeError: on the host"


def test_the_report_has_date_commit_versions_and_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h100_check, "run_step", lambda name: (name != "engines", [f"{name} said this"]))
    good, text = report(["imports", "engines"])
    assert not good
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d UTC, commit [0-9a-f]+\+?, Python 3\.", text, re.MULTILINE)
    assert "  torch 2." in text and "  fused-weight-gradient-mlp-cuda " in text
    assert "passed imports: " in text and "FAILED engines: " in text and "  engines said this" in text


def test_the_last_result_is_here_and_names_every_step() -> None:
    """Not that it passed: what has not is to be seen there."""
    text = RESULT.read_text(encoding="utf-8")
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d UTC, commit [0-9a-f]{7,}\+?, Python 3\.\d+", text, re.MULTILINE)
    assert set(re.findall(r"^(?:passed|FAILED) (\w+):", text, re.MULTILINE)) == set(STEPS)
    assert "torch 2.13.0" in text and "vllm 0.32.0" in text and "megatron-core 0.16.1" in text
