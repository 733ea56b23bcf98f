"""`prune-opd bench scaling`: the count of the work, the slopes, and `--quick` with forked ranks. No times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.studies.scaling.command import QUICK, Settings, axes_of, launches
from benchmarks.studies.scaling.work import PHASES, SLACK, Growth, growth, slope, work
from prune_opd.model_spec import ModelSpec, published
from prune_opd.plan.counts import parameters
from tests.forked.command import run_command

SPEC = ModelSpec.of(next(iter(published().values())), "published")
X = (64.0, 128.0, 256.0, 512.0, 1024.0)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_slope_is_the_power(power: float) -> None:
    assert slope(X, [3 * x**power for x in X]) == pytest.approx(power)


def test_a_quadratic_behind_a_constant_cost_is_found_by_the_last_two_points() -> None:
    """A constant that is nine tenths of the first points hides it from the fit over all of them."""
    found = growth("length", "train", X, [1000 + 0.01 * x**2 for x in X], X)
    assert found.slope < 1 + SLACK < found.last
    assert found.too_fast


def test_what_grows_with_its_work_or_slower_is_not_reported() -> None:
    assert not growth("length", "train", X, [5 + x for x in X], X).too_fast
    assert not growth("ranks", "memory", X, [1 / x for x in X], [1 / x for x in X]).too_fast
    assert Growth("length", "train", slope=1.5, last=1.0, work_slope=1.0, work_last=1.0).too_fast


def test_work_is_linear_in_rows_and_between_linear_and_quadratic_in_length() -> None:
    for phase in ("rollout", "teacher", "train"):
        once, twice = (work(SPEC, rows, 20, 128, 2)[phase] for rows in (8, 16))
        assert twice == 2 * once
        assert 1 < slope(X, [work(SPEC, 8, 0, x, 2)[phase] for x in X]) < 2
    assert work(SPEC, 8, 20, 128, 2)["sync"] == work(SPEC, 16, 20, 1024, 2)["sync"] == 2 * parameters(SPEC)


def test_the_launches_hold_every_point_of_every_axis() -> None:
    settings = Settings()
    axes = axes_of(settings)
    measured = {(*launch, *point) for launch, points in launches(settings).items() for point in points}
    assert {place for places in axes.values() for place in places} == measured
    assert tuple(place.length for place in axes["length"]) == settings.lengths
    assert tuple(place.batch for place in axes["batch"]) == settings.batches
    assert tuple(place.model for place in axes["parameters"]) == settings.models
    assert tuple(place.ranks for place in axes["ranks"]) == settings.ranks
    assert [place.batch for place in axes["ranks"]] == [settings.batch, 2 * settings.batch]  # rows of each rank: same
    varied = {"length": {"length"}, "batch": {"batch"}, "parameters": {"model"}, "ranks": {"ranks", "batch"}}
    for axis, places in axes.items():
        for key in {"model", "ranks", "batch", "length"} - varied[axis]:
            assert len({str(getattr(place, key)) for place in places}) == 1


# ---------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    done = run_command("bench", "scaling", "--quick", folder=folder, timeout=200)
    assert done.code == 0, done.stderr
    assert "against response length" in done.stdout
    return folder / "bench"


@pytest.fixture
def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scaling.json").read_text())


def test_every_axis_has_its_points_and_a_picture_is_drawn(folder: Path, result: dict[str, Any]) -> None:
    axes = result["axes"]
    assert [point["limit"] for point in axes["length"]] == list(QUICK.lengths)
    assert [point["batch"] for point in axes["batch"]] == list(QUICK.batches)
    assert axes.keys() == {"length", "batch"}  # a single model and number of ranks in the quick size
    assert (folder / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_generates_what_was_asked_for(result: dict[str, Any]) -> None:
    """Responses reach the length but for the few that end by themselves; the batch is the batch."""
    for launch in result["raw"]:
        for point in launch["ranks"][0]["points"]:
            for step in point["steps"]:
                assert 0.7 * point["length"] < step["response_length"] <= point["length"]
                assert step["tokens"] == pytest.approx(point["batch"] * step["response_length"])


def test_every_phase_is_measured_on_every_rank(result: dict[str, Any]) -> None:
    for launch in result["raw"]:
        assert len(launch["ranks"]) == launch["world"]
        for rank in launch["ranks"]:
            for step in (step for point in rank["points"] for step in point["steps"]):
                assert set(step["cpu_s"]) == {*PHASES, "step"}
                assert all(step["wall_s"][phase] > 0 for phase in PHASES)
                assert step["held_bytes"] > 0


def test_growth_is_that_of_the_points(result: dict[str, Any]) -> None:
    assert {(one["axis"], one["what"]) for one in result["growth"]} == {
        (axis, what) for axis in result["axes"] for what in (*PHASES, "memory")
    }
    for one in result["growth"]:
        points = result["axes"][one["axis"]]
        if one["what"] in PHASES:
            measured = [point["cpu_s"][one["what"]] for point in points]
            assert one["slope"] == pytest.approx(slope([point[one["axis"]] for point in points], measured))
