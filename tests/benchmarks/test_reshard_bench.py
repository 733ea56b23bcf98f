"""`prune-opd bench reshard --quick` with forked ranks. No absolute times: other work shares the machine."""

from __future__ import annotations

import json
from statistics import median
from typing import Any

import pytest

from benchmarks.reshard.command import QUICK, TRANSPORTS
from tests.forked.command import run_command


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    done = run_command("bench", "reshard", "--quick", folder=folder, timeout=240)
    assert done.code == 0, done.stderr
    assert "student TP2 → rollout TP1" in done.stdout and "collective + reload" in done.stdout
    return json.loads((folder / "bench" / "reshard.json").read_text())


def test_every_layout_and_every_contender_is_measured(result: dict[str, Any]) -> None:
    found = tuple((launch["student"], launch["rollout_tp"]) for launch in result["launches"])
    assert found == QUICK.launches
    for launch in result["launches"]:
        streams = {name for transport in TRANSPORTS for name in (transport, f"{transport} + reload")}
        assert streams | {"bare", "reload"} <= launch["wall_s"].keys()
        assert all(time > 0 for time in launch["wall_s"].values())
        assert all(time > 0 for time in launch["cpu_s"].values())


def test_ratios_are_those_of_the_medians(result: dict[str, Any]) -> None:
    for launch, raw in zip(result["launches"], result["raw"], strict=True):
        wall, times = launch["wall_s"], raw["ranks"][0]["times"]
        assert wall == {name: median(turn["wall_s"] for turn in turns) for name, turns in times.items()}
        for name in TRANSPORTS:
            larger = max(wall[name], wall["reload"])
            assert launch["ratios"][f"{name}: speed of the stream / bare broadcasts"] == wall["bare"] / wall[name]
            together = launch["ratios"][f"{name}: stream with reload / larger of the two"]
            assert together == wall[f"{name} + reload"] / larger
            assert 0 < launch["ratios"][f"{name}: checksums / stream with reload"] < 1


def test_the_bare_collectives_move_what_the_stream_moves(result: dict[str, Any]) -> None:
    """Tensor parallel ranks all have the norms, pipeline stages both have the tied embedding: those stay at home."""
    for launch in result["launches"]:
        assert 0.5 * launch["model_bytes"] < launch["moved_bytes"] < launch["model_bytes"]


def test_the_quick_size_has_no_targets(result: dict[str, Any]) -> None:
    assert result["quick"] and all(launch["targets"] == [] for launch in result["launches"])
