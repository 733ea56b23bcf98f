"""megatron-core builds the model that transformers builds, in every layout: the same logits, the same tensors back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.distributed.parity_cases import BF16, CASES, LAYOUTS, PAIRS
from tests.distributed.ranks import run_ranks
from tests.models import VOCAB, tensors_of, write_model

WORKER = Path(__file__).with_name("worker_model_parity.py")
LENGTHS = ((5, 7), (1, 1), (12, 30), (3, 1), (64, 2))  # of each row's prompt and response
COMPUTED = [(layout, case) for layout, case in PAIRS if case in CASES]

Results = dict[str, list[dict[str, Any]]]  # by layout: of every rank, findings by case


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
    for i, (case, model) in enumerate((CASES | BF16).items()):
        shape = {"num_hidden_layers": 4, **model.shape}
        directory = write_model(
            folder / case, model.family, tied=", tied" in case, seed=i, file_size=model.file_size, **shape
        )
        if case in CASES:
            expected[case] = transformers_logits(directory, rows)
        else:
            weights = {name: tensor.bfloat16() for name, tensor in tensors_of(directory).items()}
            save_file(weights, directory / "model.safetensors")
    assert len(list((folder / "qwen3, untied").glob("*.safetensors"))) > 3  # a directory of many files
    torch.save((rows, expected), folder / "expected.pt")
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """One launch for each number of ranks."""
    found: Results = {}
    for world, layouts in LAYOUTS.items():
        run_ranks(WORKER, world, [folder], timeout=300)
        ranks = [json.loads((folder / f"rank{rank}of{world}.json").read_text()) for rank in range(world)]
        found |= {layout: [rank[layout] for rank in ranks] for layout in layouts}
    return found


@pytest.mark.parametrize(("layout", "case"), COMPUTED)
def test_logits_of_a_packed_ragged_batch_equal_those_of_transformers(results: Results, layout: str, case: str) -> None:
    last_stage = [rank[case] for rank in results[layout] if "logits" in rank[case]]
    assert last_stage
    for found in last_stage:
        assert found["logits"] > 1  # there is something to compare
        assert found["transformers"] <= 1e-4


@pytest.mark.parametrize(("layout", "case"), COMPUTED)
def test_rows_do_not_see_their_neighbours_in_the_pack(results: Results, layout: str, case: str) -> None:
    assert all(rank[case]["alone"] <= 1e-5 for rank in results[layout] if "alone" in rank[case])


@pytest.mark.parametrize(("layout", "case"), PAIRS)
def test_the_shards_of_all_ranks_are_the_directorys_tensors_bit_for_bit(
    results: Results, layout: str, case: str
) -> None:
    assert all(rank[case]["bits"] for rank in results[layout])


@pytest.mark.parametrize(("layout", "case"), PAIRS)
def test_a_rank_reads_its_own_slices_and_nothing_else(results: Results, layout: str, case: str) -> None:
    """In bytes: all that it reads, and the most that it reads at once."""
    for rank in results[layout]:
        (read, most), (own, largest) = rank[case]["read"], rank[case]["own"]
        assert read == own
        assert most <= largest
        assert layout == "tp1" or read < 0.85 * rank[case]["whole"]


@pytest.mark.parametrize(("layout", "case"), PAIRS)
def test_an_export_has_the_directorys_tensors_bit_for_bit(
    results: Results, folder: Path, layout: str, case: str
) -> None:
    ours, theirs = tensors_of(folder / layout / case), tensors_of(folder / case)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("untied")])
def test_transformers_finds_every_weight_of_an_export(results: Results, folder: Path, case: str) -> None:
    from transformers import AutoModelForCausalLM

    directories = (folder / "tp2" / case, folder / case)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in directories)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
