"""Every layout holds exactly the whole model: each rank its shards, each stage and virtual chunk its layers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.worker_layout_builds import LAYOUTS, MODELS
from tests.models import write_model

WORKER = Path(__file__).with_name("worker_layout_builds.py")
EMBEDDING = "embedding.word_embeddings.weight"
LAYERS = {  # of each rank's chunks
    "tp2": [[[0, 1, 2, 3]], [[0, 1, 2, 3]]],
    "pp2": [[[0, 1]], [[2, 3]]],
    "pp2 vpp2": [[[0], [2]], [[1], [3]]],
}
CASES = [(layout, model) for layout in LAYOUTS[2] for model in MODELS]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    models, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("out")
    for model in MODELS:
        write_model(models / model, "qwen2", tied=model == "tied", num_hidden_layers=4)
    run_ranks(WORKER, 2, [models, out], timeout=120)
    return {layout: json.loads((out / f"{layout}.json").read_text()) for layout in LAYOUTS[2]}


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_every_rank_holds_its_layers(found: dict[str, list[dict[str, Any]]], layout: str, model: str) -> None:
    assert [rank[model]["layers"] for rank in found[layout]] == LAYERS[layout]


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_every_parameter_is_the_right_part_of_the_directorys_tensors(
    found: dict[str, list[dict[str, Any]]], layout: str, model: str
) -> None:
    assert [rank[model]["wrong"] for rank in found[layout]] == [[], []]


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_the_ranks_together_hold_exactly_the_whole_model(
    found: dict[str, list[dict[str, Any]]], layout: str, model: str
) -> None:
    """Once per TP rank; only a tied embedding is on the first and on the last stage of a pipeline."""
    count = Counter(name for rank in found[layout] for name in rank[model]["names"])
    copies = 2 if layout == "tp2" else 1
    expected = dict.fromkeys(found[layout][0][model]["all"], copies)
    if model == "tied":
        expected[EMBEDDING] = 2
    assert count == expected
