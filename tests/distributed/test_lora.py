"""Adapters: every layout trains what one process trains, and the rest of the student stays as it is, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from prune_opd.config.lora import TARGETS
from tests.distributed.ranks import run_ranks
from tests.distributed.tiny_run import write_pair
from tests.distributed.worker_lora import LORA, STEPS, cases, reference_of
from tests.models import tensors_of

WORKER = Path(__file__).with_name("worker_lora.py")
CASES = [(ranks, case) for ranks in (2, 4) for case in cases(ranks)]
IN_FP32 = [(ranks, case) for ranks, case in CASES if "bf16" not in case]
IN_BF16 = [(ranks, case) for ranks, case in CASES if "bf16" in case]
LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    write_pair(folder / "models" / "qwen3", num_hidden_layers=LAYERS)
    write_pair(folder / "models" / "qwen2", family="qwen2", tied=False, num_hidden_layers=LAYERS)
    for ranks in (1, 2, 4):
        run_ranks(WORKER, ranks, [folder / "models", folder / "out"], timeout=400)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    files = [folder / "out" / f"{ranks}.json" for ranks in (1, 2, 4)]
    return {case: got for file in files for case, got in json.loads(file.read_text()).items()}


def gradients(folder: Path, case: str) -> dict[str, Tensor]:
    return load_file(folder / "out" / case / "gradients.safetensors")


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of all tensors as one vector, relative to `theirs`."""
    assert ours.keys() == theirs.keys()
    differences = [(ours[name].double() - theirs[name].double()).flatten() for name in theirs]
    return float(torch.cat(differences).norm() / torch.cat([x.double().flatten() for x in theirs.values()]).norm())


# ---------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(("ranks", "case"), IN_FP32)
def test_steps_equal_those_of_one_process(results: dict[str, Any], ranks: int, case: str) -> None:
    (reference,) = results[reference_of(case)]
    assert len(results[case]) == ranks
    for rank in results[case]:
        for got, expected in zip(rank["steps"], reference["steps"], strict=True):
            for name in ("loss", "grad_norm"):
                assert got[name] == pytest.approx(expected[name], rel=1e-5), name
            for name in ("weight_norm", "overlap", "weight_mean"):
                assert got[name] == pytest.approx(expected[name], rel=1e-6), name
            for name in ("event_rate", "reliable_length_B", "horizon", "tokens", "lr"):
                assert got[name] == expected[name], name
        assert rank["logprobs"] == pytest.approx(reference["logprobs"], abs=1e-4)


@pytest.mark.parametrize(("ranks", "case"), [(ranks, case) for ranks, case in IN_FP32 if "dist-opt" not in case])
def test_gradients_equal_those_of_one_process(folder: Path, ranks: int, case: str) -> None:
    ours, theirs = gradients(folder, case), gradients(folder, reference_of(case))
    assert all(tensor.any() for tensor in theirs.values())
    assert len(theirs) == LAYERS * (len(TARGETS) + 3 + 1 + 2 + 1)  # an A of each target, a B of each matrix
    for name in theirs:
        assert distance({name: ours[name]}, {name: theirs[name]}) < 1e-5, name


@pytest.mark.parametrize(("ranks", "case"), IN_FP32)
@pytest.mark.parametrize("what", ["hf", "hf/adapter"])
def test_exports_equal_those_of_one_process(folder: Path, ranks: int, case: str, what: str) -> None:
    ours, theirs = (tensors_of(folder / "out" / one / what) for one in (case, reference_of(case)))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-6


@pytest.mark.parametrize(("ranks", "case"), IN_BF16)
def test_bf16_gradients_are_as_near_to_fp32_as_those_of_one_process(folder: Path, ranks: int, case: str) -> None:
    exact = gradients(folder, "one")
    alone, ours = (distance(gradients(folder, name), exact) for name in ("bf16 one", case))
    assert 1e-3 < alone < 0.1
    assert ours < 1.3 * alone


# ---------------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize(("ranks", "case"), [*CASES, (1, "one"), (1, "bf16 one"), (1, "qwen2 one")])
def test_only_adapters_have_gradients_and_optimizer_state(results: dict[str, Any], ranks: int, case: str) -> None:
    for rank in results[case]:
        frozen = rank["frozen"]
        assert frozen["gradients of others"] == []
        assert frozen["buffers"] == frozen["adapters"]
        share = 2 if "dist-opt" in case else 1
        states = 3 * frozen["adapters"] / share  # of the optimizer: the parameter and two moments
        assert states <= frozen["optimizer"] < 1.02 * states  # and Adam's counters
        assert frozen["others"] > 6 * frozen["adapters"]


def test_exported_weights_without_an_adapter_are_those_of_the_student(folder: Path) -> None:
    for case, model in (("one", "qwen3"), ("qwen2 TP2+SP", "qwen2")):
        before, after = tensors_of(folder / "models" / model / "student"), tensors_of(folder / "out" / case / "hf")
        assert before.keys() == after.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {name for name in before if name.endswith("proj.weight")}


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_alone_is_trained_alone(results: dict[str, Any], target: str) -> None:
    names, losses = results["alone"]["targets"][target]
    assert names == [target]
    assert len(set(losses)) == STEPS


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_fresh_adapters_change_no_bit(results: dict[str, Any], dtype: str) -> None:
    assert results["alone"]["start"][dtype] == {"hidden states": True, "weights": True}


def test_the_output_heads_gradient_is_never_formed(results: dict[str, Any]) -> None:
    assert results["alone"]["head gradients"] == 0


def test_a_teacher_at_the_moving_average_takes_in_the_adapters(results: dict[str, Any]) -> None:
    assert results["alone"]["average"] < 1e-6


# ---------------------------------------------------------------------------------------------------- peft


IN_PEFT = ("one", "TP2+SP", "bf16 one", "qwen2 one")


@pytest.fixture(scope="module")
def peft(folder: Path) -> dict[str, Any]:
    """Of each case, what peft makes of its export."""
    packages = Path(__file__).parents[2] / ".venv-peft"
    if not packages.is_dir():
        pytest.skip("peft is not there: make setup-peft-test puts it into .venv-peft, if pip can get it")
    worker, out = WORKER.with_name("worker_peft.py"), {case: folder / f"peft {case}.json" for case in IN_PEFT}
    arguments: list[Path] = []
    for case in IN_PEFT:
        student = folder / "models" / ("qwen2" if "qwen2" in case else "qwen3") / "student"
        arguments += [student, folder / "out" / case / "hf", out[case]]
    run_ranks(worker, 1, arguments, timeout=120, env={"PYTHONPATH": f"{WORKER.parents[2]}:{packages}"}, kind="fresh")
    return {case: json.loads(path.read_text()) for case, path in out.items()}


@pytest.mark.parametrize("case", IN_PEFT)
def test_peft_gives_the_logits_of_the_trainer_and_of_the_merged_model(
    peft: dict[str, Any], results: dict[str, Any], case: str
) -> None:
    found = peft[case]
    assert found["rank"] == LORA.rank and found["adapters"] == LAYERS * 7
    if "bf16" in case:  # merged weights are rounded, as all of a bf16 model is
        assert found["mean difference"] < 1.5 * found["mean difference of bf16"]
    else:
        assert found["largest difference"] < 1e-5
        assert found["logprobs"] == pytest.approx(results[case][0]["logprobs"], abs=1e-4)
    assert found["largest difference from the base"] > 0.1
