"""Every layout of student and teacher trains the run that one process trains: the matrix of the design.

Three full steps (teacher pass, gated loss, optimizer, controller) on made-up rollouts that end at the horizon, so that
an event that came out differently would show in everything after it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.ranks import run_ranks
from tests.distributed.tiny_run import LENGTHS, write_pair
from tests.distributed.worker_layout_matrix import REFERENCES, STEPS, cases, reference_of
from tests.models import write_model

WORKER = Path(__file__).with_name("worker_layout_matrix.py")
CASES = [(ranks, case) for ranks in (2, 4) for case in cases(ranks)]
LAYERS, WIDTH, TEACHER_WIDTH = 4, 64, 96


def write_models(folder: Path) -> None:
    """folder/student, tied, and folder/teacher, untied and wider, that agrees with it here and there.

    The teacher is the student in the first dimensions of its hidden states, with noise on all of its weights.
    """
    student = write_model(folder / "student", seed=1, tied=True, num_hidden_layers=LAYERS)
    shape = {"num_hidden_layers": LAYERS, "hidden_size": TEACHER_WIDTH}
    teacher = write_model(folder / "teacher", seed=1, tied=False, **shape)
    narrow, wide = (load_file(path / "model.safetensors") for path in (student, teacher))
    narrow["lm_head.weight"] = narrow["model.embed_tokens.weight"]
    draw = torch.Generator().manual_seed(2)
    for name, tensor in wide.items():
        noise = 0.08 * torch.randn(tensor.shape, generator=draw)
        if "norm" in name:
            tensor.fill_(1.0)
        else:
            tensor.zero_()
            noise *= narrow[name].std()
        part = tensor[tuple(slice(size) for size in narrow[name].shape)]
        part.copy_(narrow[name])
        if "norm" in name and len(tensor) == TEACHER_WIDTH:
            tensor *= math.sqrt(WIDTH / TEACHER_WIDTH)  # the mean square is over more dimensions, empty but for noise
        tensor += noise
    save_file(wide, teacher / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Of each case, what every rank has got; the references are the runs of one process."""
    models, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("out")
    write_models(models / "dense")
    write_pair(models / "moe", family="qwen3_moe", num_hidden_layers=LAYERS)
    for ranks in (1, 2, 4):
        # Forked ranks have one hash seed; those of torchrun have one each, so an order that a set decides would show.
        run_ranks(WORKER, ranks, [models, out], timeout=300, kind="fresh" if ranks == 2 else "eager")
    return {case: got for ranks in (1, 2, 4) for case, got in json.loads((out / f"{ranks}.json").read_text()).items()}


@pytest.mark.parametrize(("ranks", "case"), CASES)
def test_three_steps_equal_those_of_one_process(
    results: dict[str, list[dict[str, Any]]], ranks: int, case: str
) -> None:
    (reference,) = results[reference_of(case)]
    assert len(results[case]) == ranks
    for rank in results[case]:
        for got, expected in zip(rank["steps"], reference["steps"], strict=True):
            for name in ("loss", "grad_norm", *(key for key in expected if key.startswith("stale"))):
                assert got[name] == pytest.approx(expected[name], rel=1e-5), name
            assert got["weight_norm"] == pytest.approx(expected["weight_norm"], rel=1e-6)
            assert got["sampled_tokens"] == pytest.approx(expected["sampled_tokens"], rel=1e-5, abs=1e-5)
            for name in ("overlap", "weight_mean"):
                assert got[name] == pytest.approx(expected[name], rel=1e-6), name
            for name in ("overlap_by_position", "weight_by_position"):
                for ours, theirs in zip(got[name], expected[name], strict=True):  # None where no response has been
                    assert ours == theirs or ours == pytest.approx(theirs, rel=1e-6), name
            for name in ("event_rate", "reliable_length_B", "horizon", "tokens", "lr"):
                assert got[name] == expected[name], name
        assert rank["parameters"] <= 1e-6


@pytest.mark.parametrize(("ranks", "case"), CASES)
def test_all_ranks_report_the_same_numbers(results: dict[str, list[dict[str, Any]]], ranks: int, case: str) -> None:
    first, *others = results[case]
    assert all(rank["steps"] == first["steps"] for rank in others)


@pytest.mark.parametrize(("ranks", "case"), CASES)
def test_all_groups_of_a_rank_share_a_device(results: dict[str, list[dict[str, Any]]], ranks: int, case: str) -> None:
    """Layout after layout, with some thirty groups each: a device of each group's own would be a thread of its own."""
    assert [rank["socket_threads"] for rank in results[case]] == [1] * ranks


def test_a_device_is_made_for_each_interface_that_is_named(results: dict[str, list[Any]]) -> None:
    assert results["devices of two interfaces"] == [2]


@pytest.mark.parametrize(("ranks", "case"), CASES)
def test_the_teacher_has_no_gradients_and_no_optimizer_state(
    results: dict[str, list[dict[str, Any]]], ranks: int, case: str
) -> None:
    assert [rank["teacher_extras"] for rank in results[case]] == [[]] * ranks


@pytest.mark.parametrize(("ranks", "case"), CASES)
def test_log_probabilities_of_sampled_tokens_equal_those_of_one_process(
    results: dict[str, list[dict[str, Any]]], ranks: int, case: str
) -> None:
    (reference,) = results[reference_of(case)]
    for rank in results[case]:
        assert rank["logprobs"] == pytest.approx(reference["logprobs"], abs=1e-4)  # the bound for logits


@pytest.mark.parametrize("reference", REFERENCES)
def test_the_comparison_has_something_to_compare(results: dict[str, list[dict[str, Any]]], reference: str) -> None:
    ((result,), steps) = results[reference], results[reference][0]["steps"]
    assert len(result["logprobs"]) == sum(LENGTHS)
    assert len(steps) == STEPS
    assert all(0.05 < step["event_rate"] < 0.95 and 0.2 < step["overlap"] < 0.95 for step in steps)
    assert len({step["horizon"] for step in steps}) > 1
    assert steps[0]["microbatches"] > 1
    assert sum(value > 0 for value in steps[0]["sampled_tokens"]) > 30  # of the first step, which is a sampled one
    assert len({step["weight_norm"] for step in steps}) == STEPS
    assert all(("stale_ratio_mean" in step) == (reference == "stale") for step in steps)
    scored = ["reward"] if reference == "reward" else []
    assert all(step["phases"] == [*scored, "teacher", "train"] for step in steps)
    plain = results["3 updates"][0]["steps"]
    if reference == "reward":  # the first step's rollouts are those of the runs without
        assert steps[0]["overlap"] == plain[0]["overlap"] and steps[0]["grad_norm"] > 1.05 * plain[0]["grad_norm"]
    assert all(0 < step.get("stale_clip_fraction", 0.5) < 1 for step in steps)
