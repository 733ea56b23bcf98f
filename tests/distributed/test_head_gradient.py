"""The head's gradient straight into megatron's buffer trains what it trains through autograd, tied or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.ranks import read_ranks, run_ranks
from tests.distributed.tiny_run import write_pair

WORKER = Path(__file__).with_name("worker_head_gradient.py")
RANKS = 2  # in one tensor-parallel group


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in ("tied", "untied"):
        write_pair(folder / kind, tied=kind == "tied")
    return folder


@pytest.fixture(scope="module")
def output(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    run_ranks(WORKER, RANKS, [models, folder, str(RANKS)], timeout=120)
    return folder


def records(output: Path, case: str) -> list[dict[str, Any]]:
    return [rank[case] for rank in read_ranks(output, RANKS)]


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_buffer_was_used_in_every_micro_batch_and_only_where_it_should_be(output: Path, kind: str) -> None:
    for record in records(output, f"{kind} buffer"):
        # One look without gradients and one step, each over all micro-batches.
        assert record["microbatches"] > 1 and record["given"] == [True] * 2 * record["microbatches"]
        assert set(record["chunks"]) == {7}  # parallel.loss_chunk_tokens
    for record in records(output, f"{kind} autograd"):
        assert not any(record["given"])


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_step_is_the_one_of_autograd(models: Path, output: Path, kind: str) -> None:
    before = load_file(models / kind / "student" / "model.safetensors")
    heads = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if kind == "untied" else set())
    assert heads <= before.keys()
    for rank, (ours, plain) in enumerate(
        zip(records(output, f"{kind} buffer"), records(output, f"{kind} autograd"), strict=True)
    ):
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-6)
        got = load_file(output / f"{kind} buffer.rank{rank}.safetensors")
        expected = load_file(output / f"{kind} autograd.rank{rank}.safetensors")
        assert got.keys() == expected.keys() == before.keys()
        for name, tensor in expected.items():
            assert (tensor - before[name]).abs().max() > 1e-5, f"{name} did not move"
            assert (got[name] - tensor).abs().max() <= 1e-6, name
