"""The loss with its tokens shared among context-parallel ranks: as if one rank had them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import read_ranks, run_ranks
from tests.distributed.worker_context_loss import CASES

WORKER = Path(__file__).with_name("worker_context_loss.py")

Results = list[dict[str, Any]]  # of every rank


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the reference: the first launch writes the file, the second reads it."""
    return tmp_path_factory.mktemp("context_loss") / "answers.pt"


@pytest.fixture(scope="module", params=[(1, 2), (2, 2)], ids=lambda param: f"tp {param[0]} cp {param[1]}")
def results(request: pytest.FixtureRequest, answers: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    tp, cp = request.param
    folder = tmp_path_factory.mktemp("context_loss")
    run_ranks(WORKER, tp * cp, [folder, str(tp), str(cp), answers], timeout=120)
    return read_ranks(folder, tp * cp)


@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_statistics_equal_those_of_the_whole(results: Results, case: str) -> None:
    tolerance = 2e-5 if case == "float32" else 1e-9
    for rank in results:
        assert rank[case]["loss"] <= tolerance
        assert rank[case]["hidden_gradient"] <= tolerance
        assert rank[case]["weight_gradient"] <= tolerance
        assert rank[case]["statistics"] <= max(tolerance, 1e-7)  # overlap is float32


def test_hidden_states_that_are_not_finite_on_one_rank_raise_on_all(results: Results) -> None:
    for rank in results:
        assert "student_hidden gives logits that are not finite" in rank["broken_hidden"]["raised"]


def test_an_index_that_does_not_fit_is_refused_before_any_collective(results: Results) -> None:
    for rank in results:
        assert "context.index has" in rank["wrong_index"]["index"]
        assert "it must cover the tokens of context" in rank["wrong_index"]["tokens"]
