"""The fused loss over a tensor-parallel group: value, statistics and both gradients equal the reference's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import read_ranks, run_ranks
from tests.distributed.worker_distill import cases
from tests.sharp import SHARP_TOLERANCE

WORKER = Path(__file__).with_name("worker_distill.py")
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2, "sharp": SHARP_TOLERANCE}  # by the end of the case's name

Results = list[dict[str, Any]]  # of every rank


# One rank; two in one group; two groups of two side by side (a group's ranks are not the world's); one group of four.
LAUNCHES = {f"{ranks} ranks tp {tp}": (ranks, tp) for ranks, tp in ((1, 1), (2, 2), (4, 2), (4, 4))}


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    """The first one leaves the reference's answers, which the others read."""
    answers, found = tmp_path_factory.mktemp("distill") / "answers.pt", {}
    for name, (ranks, tensor_parallel) in LAUNCHES.items():
        folder = tmp_path_factory.mktemp("distill")
        run_ranks(WORKER, ranks, [folder, str(tensor_parallel), answers], timeout=300)
        found[name] = read_ranks(folder, ranks)
    return found


@pytest.fixture(params=LAUNCHES)
def results(request: pytest.FixtureRequest, launches: dict[str, Results]) -> Results:
    return launches[request.param]


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, of in LAUNCHES.items() for case in cases(*of)])
def test_value_gradients_and_statistics_equal_the_reference_on_every_rank(
    launches: dict[str, Results], name: str, case: str
) -> None:
    tolerance = TOLERANCE.get(case.split()[-1], 1e-9)
    for rank in launches[name]:
        assert rank[case]["loss"] <= tolerance
        assert rank[case]["hidden_gradient"] <= tolerance
        assert rank[case]["weight_gradient"] <= tolerance
        assert rank[case]["statistics"] <= max(tolerance, 1e-7)  # overlap is float32


def test_a_raw_all_reduce_has_the_right_value_and_is_caught_by_its_hidden_gradient(results: Results) -> None:
    """The comparison above would not be worth much if the usual mistake passed it."""
    for rank in results:
        errors = rank["raw_all_reduce"]
        assert errors["loss"] <= 1e-9
        assert errors["weight_gradient"] <= 1e-9
        assert (errors["hidden_gradient"] > 0.1) == (len(results) > 1)  # a rank on its own has nothing to miss


def test_top_k_breaks_ties_toward_the_lower_id_across_shards(results: Results) -> None:
    assert [rank["top_k_of_ties"]["wrong"] for rank in results] == [0] * len(results)


def test_hidden_states_that_are_not_finite_raise_on_every_rank(results: Results) -> None:
    for rank in results:
        assert "student_hidden gives logits that are not finite" in rank["broken_hidden"]["raised"]


def test_a_weight_too_small_for_the_vocabulary_is_refused_before_any_collective(results: Results) -> None:
    for rank in results:
        assert "ConfigError: vocab_size = 61 does not fit student_weight" in rank["too_few_rows"]["raised"]
