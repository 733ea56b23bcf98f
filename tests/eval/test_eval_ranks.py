"""`prune-opd eval --tensor-parallel 2`: two ranks share a model, and its answers are those of one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import read_ranks, run_ranks
from tests.models import write_model

WORKER = Path(__file__).with_name("worker_eval.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """By tensor parallel size: each rank's engine, the answers, the results."""
    model, by_size = write_model(tmp_path_factory.mktemp("model") / "student"), {}
    for size in (1, 2):
        out = tmp_path_factory.mktemp(f"tp{size}")
        run_ranks(WORKER, size, [model, out, str(size)], timeout=300)
        answers, results = (
            [json.loads(line) for line in (out / name).read_text().splitlines()]
            for name in ("answers.jsonl", "results.jsonl")
        )
        by_size[size] = {"ranks": read_ranks(out, size), "answers": answers, "results": results}
    return by_size


def test_two_ranks_are_one_engine_with_half_of_the_heads_each(found: dict[int, dict[str, Any]]) -> None:
    assert found[1]["ranks"] == [{"tensor_parallel": 1, "engines": 1, "heads": 4}]
    assert found[2]["ranks"] == [{"tensor_parallel": 2, "engines": 1, "heads": 2}] * 2


def test_their_answers_are_those_of_one_rank(found: dict[int, dict[str, Any]]) -> None:
    answers = found[1]["answers"]
    assert len(answers) == 32 and len({answer["response"] for answer in answers}) > 16  # sampled, not all alike
    assert found[2]["answers"] == answers
    assert found[2]["results"] == found[1]["results"]
