"""The examples run as they are; of the notebook every cell but the training, for which a made-up run stands in."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import prune_opd
from tests.track.synthetic import write_run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_gate_on_numbers_prints_what_its_comments_say(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "gate_on_numbers.py"), run_name="__main__")
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["overlap"] == "[[1.0, 0.75, 0.0, 1.0, 0.0, 1.0]]"
    assert said["events"] == "[[0, 0, 1, 0, 1, 0]]"
    assert said["weight"] == "[[1.5, 1.5, 1.0, 1.0, 0.5, 0.5]]"
    assert said["reliable"].startswith("[4] tokens")
    assert said["window"].startswith("[64] → 96 → 128") and said["window"].endswith("→ 64")


def test_a_run_is_read_back_and_its_report_drawn_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", steps=6, evaluate_every=3)
    monkeypatch.setattr(sys, "argv", ["read_a_run.py", str(run)])
    runpy.run_path(str(EXAMPLES / "read_a_run.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "ledger-prune: 6 steps, k = 16, horizon prune" in said and "step   6: eval_ledger" in said
    assert (run / "again.html").stat().st_size > 50_000


def test_the_cells_of_the_notebook_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads((EXAMPLES / "first_training.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    asked: list[tuple[str, int]] = []

    def train(config: Any, run_dir: str) -> int:
        asked.append((run_dir, config.steps))
        write_run(tmp_path / run_dir, name=config.name, steps=config.steps)
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prune_opd, "train", train, raising=False)
    names: dict[str, object] = {}
    for cell in code[:-1]:  # the last one shows the report in the notebook's own frame
        exec(compile(cell, "first_training.ipynb", "exec"), names)
    assert asked == [("runs/first", 4)] and names["code"] == 0
    assert len(names["steps"]) == 4  # type: ignore[arg-type]
    assert "IFrame" in code[-1]
