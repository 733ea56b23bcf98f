"""A teacher's best ids over a sharded vocabulary and context-parallel ranks: the reference's loss and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ranks import read_ranks, run_ranks

WORKER = Path(__file__).with_name("worker_known_top.py")

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the reference: the first launch writes the file, the others read it."""
    return tmp_path_factory.mktemp("known_top") / "answers.pt"


@pytest.mark.parametrize(("ranks", "tensor_parallel"), [(2, 2), (2, 1), (4, 2)])
def test_value_gradients_and_statistics_equal_the_reference(
    tmp_path: Path, answers: Path, ranks: int, tensor_parallel: int
) -> None:
    run_ranks(WORKER, ranks, [tmp_path, str(tensor_parallel), answers], timeout=300)
    for found in read_ranks(tmp_path, ranks):
        assert len(found) > 40
        for case, errors in found.items():
            # Log q arrives in fp32 there: of k2, a difference of two logs, 3e-5 of its gradient is that rounding.
            tolerance = 5e-5 if case.endswith("float32") else 1e-8
            assert max(errors.values()) <= tolerance, (case, errors)
