"""Two teachers with an in-flight gate and a calibration each: killed and resumed, the run is the unbroken one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from prune_opd.config import GateConfig, InflightConfig, TeacherConfig, TeacherLayout, TrainConfig
from tests.distributed.tiny_run import write_pair
from tests.faults.runs import config_of, ended_run, latest, records, write_prompts
from tests.models import write_model

STEPS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Prompts take turns between the teachers. b is wider than a, agrees with the student less, and lies otherwise."""
    folder = tmp_path_factory.mktemp("models")
    write_pair(folder)
    write_model(folder / "other", seed=3, tied=False, hidden_size=96)
    rows = []
    for line in write_prompts(folder / "all.jsonl").read_bytes().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    rows = [row for row in rows if row["prompt"].strip()]
    named = [json.dumps({**row, "who": "ab"[i % 2]}) for i, row in enumerate(rows)]
    (folder / "prompts.jsonl").write_text("\n".join(named) + "\n")
    one = config_of(folder)
    looks = InflightConfig(mode="gate", schedule="fixed", first_check=4, chunk=4)
    return dataclasses.replace(
        one,
        steps=STEPS,
        teacher="",
        teachers={
            "a": TeacherConfig(str(folder / "teacher"), parallel=TeacherLayout(tensor=1)),
            "b": TeacherConfig(str(folder / "other"), weight=0.5, parallel=TeacherLayout(tensor=1, pipeline=2)),
        },
        gate=GateConfig(metric="overlap_quantile", k=8, quantile=0.3, w_drop=0.5, calibration_steps=3, early_tokens=4),
        data=dataclasses.replace(one.data, teacher_column="who"),
        rollout=dataclasses.replace(one.rollout, inflight=looks),
    )


@pytest.fixture(scope="module")
def unbroken(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    ended = ended_run(config, run_dir)
    assert ended.code == 0, ended.output
    return run_dir


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_killed_and_resumed_it_has_the_metrics_of_an_undisturbed_run(
    config: TrainConfig, unbroken: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "killed"
    assert ended_run(config, run_dir, "kill in backward", 4, 1).code != 0
    ended = ended_run(config, run_dir)
    assert ended.code == 0, ended.output
    assert records(run_dir) == records(unbroken)


def test_each_teacher_has_a_window_a_threshold_and_a_part_of_the_gate_in_flight(unbroken: Path) -> None:
    steps = steps_of(unbroken)
    assert any(step["horizon_of_a"] != step["horizon_of_b"] for step in steps)
    assert steps[-1]["usual_overlap_of_a"] != steps[-1]["usual_overlap_of_b"]
    assert sum(step["pruned_inflight"] for step in steps) > 0
    assert all(step["inflight_too_early"] == 0 for step in steps)
    state = json.loads((unbroken / "checkpoints" / latest(unbroken) / "state.json").read_text())
    assert set(state["controller"]["teachers"]) == set(state["calibration"]["teachers"]) == {"a", "b"}


def test_a_third_teacher_is_another_run_and_starts_anew_where_that_is_allowed(
    config: TrainConfig, unbroken: Path
) -> None:
    third = dataclasses.replace(config.teachers["a"], weight=2.0)
    more = dataclasses.replace(config, steps=STEPS + 1, teachers={**config.teachers, "third": third})
    before = (unbroken / "metrics.jsonl").read_bytes()
    refused = ended_run(more, unbroken)
    # `prune-opd train` names the setting first, in the process that starts the ranks (test_several_teachers_config.py).
    assert refused.code != 0
    assert "the checkpoint has a horizon for the teachers a, b, this run has a, b, third" in refused.output
    assert (unbroken / "metrics.jsonl").read_bytes() == before
    windows = [steps_of(unbroken)[-1][f"horizon_of_{name}"] for name in "ab"]
    allowed = ended_run(more, unbroken, options=("--allow-config-change",))
    assert allowed.code == 0, allowed.output
    assert "the controller starts anew: the checkpoint has a horizon for the teachers a, b" in allowed.output
    last = steps_of(unbroken)[-1]
    assert last["step"] == STEPS + 1 and last["horizon_of_third"] == config.horizon.init_len
    assert all(abs(last[f"horizon_of_{name}"] - was) <= 4 for name, was in zip("ab", windows, strict=True))
