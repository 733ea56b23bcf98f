"""The report's table of speed: means over the seconds, and only what the run has measured or planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from synthetic import write_run

from prune_opd.track.metrics import meaning
from prune_opd.track.report import write_report
from prune_opd.track.report_speed import HEAD, speed_rows, speed_table


def step(seconds: float, **values: float) -> dict[str, Any]:
    phases = ("rollout", "teacher", "train", "step")
    record = {f"time_{phase}": seconds for phase in phases} | {f"flops_{phase}": 1e9 for phase in phases}
    return record | {f"speed_{phase}": 100.0 for phase in phases} | values


def test_rates_are_means_over_the_seconds() -> None:
    steps = [step(1.0, speed_train=100.0, mfu_train=0.1), step(3.0, speed_train=200.0, mfu_train=0.5)]
    rows = {row[0]: dict(zip(HEAD, row, strict=True)) for row in speed_rows(steps)}
    assert rows["train"]["tokens/s of each rank"] == "175" and rows["train"]["MFU"] == "40.0%"
    assert rows["train"]["s a step"] == "2" and rows["train"]["planned s"] == "–"
    assert rows["rollout"]["MFU"] == "–" and rows["rollout"]["FLOP/s of each rank"] == "1e+09"


def test_the_plan_stands_beside_what_was_measured() -> None:
    steps = [step(2.0, planned_time_train=1.0, planned_mfu_train=0.4, mfu_train=0.2)] * 2
    train = dict(zip(HEAD, speed_rows(steps)[2], strict=True))
    assert (train["s a step"], train["planned s"], train["MFU"], train["planned MFU"]) == ("2", "1", "20.0%", "40.0%")


@pytest.mark.usefixtures("first_chart")
def test_the_report_has_the_table_and_an_older_run_has_none(tmp_path: Path) -> None:
    assert speed_table([{"step": 1, "time_step": 1.0}]) == "" == speed_table([])
    run = write_run(tmp_path / "run", steps=4)
    write_report([run], tmp_path / "with.html")
    page = (tmp_path / "with.html").read_text()
    assert "tokens/s of each rank" in page and "planned MFU" in page


def test_every_key_of_the_speed_has_a_meaning() -> None:
    phases = ("rollout", "teacher", "train", "step")
    keys = [f"{kind}_{phase}" for kind in ("flops", "speed", "mfu") for phase in phases]
    keys += [f"planned_time_{phase}" for phase in ("sync", *phases[:3])] + [
        f"planned_mfu_{phase}" for phase in phases[:3]
    ]
    assert not [key for key in keys if meaning(key) is None]
