"""`make gpu-check` in a small size on the CPU: every step runs, one that fails does not end the others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts import gpu_check
from scripts.gpu_check import SMALL, Row, run


def test_every_step_leaves_its_figures_on_a_page_and_as_json(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu_check, "PACKAGES", ("this", "a_package_that_nobody_has"))  # the real ones take long
    rows = run(tmp_path, SMALL)
    assert [row.what for row in rows if row.passed is False] == []
    assert {row.step for row in rows} == set(gpu_check.STEPS)
    imports = {row.what: row.passed for row in rows if row.step == "machine"}
    assert imports["this"] and imports["a_package_that_nobody_has"] is None
    gradients = [float(row.figure) for row in rows if "gradient" in row.what]
    assert len(gradients) == 4 and all(0 < error < 2e-2 for error in gradients)
    assert json.loads((tmp_path / "gpu-check.json").read_text())[0]["what"] == "device"
    page = (tmp_path / "gpu-check.md").read_text()
    assert all(f"| {row.step} | {row.what} |" in page for row in rows)


def test_a_step_that_fails_is_said_and_the_others_go_on(tmp_path: Path) -> None:
    def breaks(machine: Any, size: Any) -> Iterator[Row]:
        yield Row("first", "before it", "1", "1", True)
        raise RuntimeError("the device fell off")

    rows = run(tmp_path, SMALL, {"first": breaks, "mover": gpu_check.mover_step})
    assert [(row.step, row.passed) for row in rows[:2]] == [("first", True), ("first", False)]
    assert "the device fell off" in rows[1].figure
    assert rows[2].step == "mover" and rows[2].passed


def test_wrong_gradients_fail(tmp_path: Path, monkeypatch: Any) -> None:
    exact = gpu_check._gradients

    def wrong(machine: Any, size: Any, dtype: Any, precision: Any) -> Any:
        hidden, weight = exact(machine, size, dtype, precision)
        return (hidden * 1.05 if precision == dtype else hidden), weight

    monkeypatch.setattr(gpu_check, "_gradients", wrong)
    rows = run(tmp_path, SMALL, {"loss": gpu_check.loss_step})
    assert [row.passed for row in rows if "hidden gradient" in row.what] == [False, False]
