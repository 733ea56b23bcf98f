"""The teacher's self-test before a run: trained teachers pass, one whose weights were shuffled is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from prune_opd.config import CorpusConfig
from prune_opd.config.recipe import load_recipe
from prune_opd.data.ledger import Ledger, worked_solution
from tests.distributed.ranks import read_ranks, run_ranks
from tests.models import tensors_of

WORKER = Path(__file__).with_name("worker_self_test.py")


def shuffled(directory: Path, out: Path) -> Path:
    """A copy in which every tensor has its own numbers in another order: norms and scales stay what they were."""
    from safetensors.torch import save_file

    shutil.copytree(directory, out)
    draw = torch.Generator().manual_seed(0)
    weights = {
        name: t.flatten()[torch.randperm(t.numel(), generator=draw)].view_as(t)
        for name, t in tensors_of(directory).items()
    }
    for file in out.glob("*.safetensors"):
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, out / "model.safetensors")
    return out


@pytest.fixture(scope="module", params=[(1, 1), (2, 2)], ids=["two replicas", "head over two ranks, two stages"])
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    out = tmp_path_factory.mktemp("self_test")
    good, drift = (Path(load_recipe(name).teacher) for name in ("tiny_compatible", "tiny_drift"))
    bad = shuffled(good, out / "shuffled")
    # A file has no worked solutions: its prompts are the text. These teachers know a solution better than a problem.
    problem = Ledger().problem(0, 0)
    words, _ = worked_solution(problem, np.random.default_rng(0), CorpusConfig())
    (out / "text.jsonl").write_text(json.dumps({"prompt": " ".join([problem.prompt, *words])}) + "\n")
    teachers = {"good": good, "drift": drift, "shuffled": bad, "off": bad, "prompts": good, "prompts, shuffled": bad}
    arguments = [f"{name}={directory}" for name, directory in teachers.items()]
    run_ranks(WORKER, 2, [out, *map(str, request.param), str(good), *arguments], timeout=90)
    return read_ranks(out, 2)


def test_trained_teachers_pass_and_their_number_is_said(said: list[dict[str, str | None]]) -> None:
    for name in ("good", "drift", "prompts"):
        text = said[0][name] or ""
        found = re.fullmatch(r"teacher: .* median log-probability of (-\d+\.\d\d) nats \(limit: -2\.65\)", text)
        assert found and -2 < float(found[1]) <= 0, text


def test_shuffled_weights_are_refused(said: list[dict[str, str | None]]) -> None:
    assert "text.jsonl unlikely" in (said[0]["prompts, shuffled"] or "")
    text = said[0]["shuffled"] or ""
    assert text.startswith("refused: teacher = '") and "finds reference text of ledger unlikely" in text
    median = re.search(r"median log-probability of \d+ tokens is (-\d+\.\d\d) nats \(limit: -2\.65; an even", text)
    assert median and float(median[1]) < -10
    assert "survival.teacher_test=0" in text


def test_all_ranks_say_the_same_and_it_can_be_switched_off(said: list[dict[str, str | None]]) -> None:
    assert said[0] == said[1]
    assert said[0]["off"] is None


def test_ends_that_differ_between_ranks_are_refused_on_all_of_them(said: list[dict[str, str | None]]) -> None:
    for of_rank in said:
        text = of_rank["agreement"] or ""
        assert re.fullmatch(
            r"the ids differ between the ranks: \(0, 2\) on rank 0 \(.+\), \(1, 2\) on rank 1 \(.+\): copy the files",
            text,
        )
