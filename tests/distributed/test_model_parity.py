"""megatron-core builds the model that transformers builds: the same logits, and the same tensors back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.launch import run_ranks
from tests.models import FAMILIES, VOCAB, write_model

WORKER = Path(__file__).with_name("worker_model_parity.py")
CASES = [f"{family}-{head}" for family in FAMILIES for head in ("tied", "untied")]
LENGTHS = ((5, 7), (1, 1), (12, 30), (3, 1), (64, 2))  # of each row's prompt and response

Results = list[dict[str, Any]]  # of every rank


def random_rows() -> dict[str, list[list[int]]]:
    draw = torch.Generator().manual_seed(3)

    def ids(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=draw).tolist()

    return {"prompts": [ids(p) for p, _ in LENGTHS], "responses": [ids(r) for _, r in LENGTHS]}


@torch.no_grad()
def transformers_logits(directory: Path, rows: dict[str, list[list[int]]]) -> list[Tensor]:
    """Every row alone, without its last token: that one predicts nothing."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    whole = [prompt + response for prompt, response in zip(rows["prompts"], rows["responses"], strict=True)]
    return [model(torch.tensor([ids[:-1]])).logits[0] for ids in whole]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    rows = random_rows()
    expected = {}
    for i, case in enumerate(CASES):
        family, head = case.split("-")
        write_model(folder / case, family, tied=head == "tied", seed=i, rope_parameters={"rope_theta": 5e4 + i})
        expected[case] = transformers_logits(folder / case, rows)
    torch.save((rows, expected), folder / "expected.pt")
    return folder


@pytest.fixture(scope="module", params=[1, 2], ids=lambda size: f"tp{size}")
def tensor_parallel(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def results(folder: Path, tensor_parallel: int) -> Results:
    run_ranks(WORKER, tensor_parallel, [folder, str(tensor_parallel)], timeout=120)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(tensor_parallel)]


@pytest.mark.parametrize("case", CASES)
def test_logits_of_a_packed_ragged_batch_equal_those_of_transformers(results: Results, case: str) -> None:
    for rank in results:
        assert rank[case]["logits"] > 1  # there is something to compare
        assert rank[case]["transformers"] <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_rows_do_not_see_their_neighbours_in_the_pack(results: Results, case: str) -> None:
    for rank in results:
        assert rank[case]["alone"] <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_the_resharding_stream_gives_every_tensor_back_bit_for_bit(results: Results, case: str) -> None:
    assert all(rank[case]["streamed"] for rank in results)


@pytest.mark.parametrize("case", CASES)
def test_an_export_loads_in_transformers_with_identical_logits(
    results: Results, folder: Path, tensor_parallel: int, case: str
) -> None:
    rows, expected = torch.load(folder / "expected.pt")
    exported = transformers_logits(folder / f"{case}.tp{tensor_parallel}", rows)
    assert all(torch.equal(got, want) for got, want in zip(exported, expected[case], strict=True))
