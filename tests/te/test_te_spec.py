"""The same weights in Transformer Engine's modules: names, shapes, checkpoints. Its kernels are stubs (stub.py).

Three launches: megatron-core's own modules on one rank, Transformer Engine's on two (tensor parallel), then the first
again, so that checkpoints go both ways and between layouts.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.distributed.ranks import REPOSITORY, run_ranks
from tests.models import tensors_of, write_model
from tests.te import stub
from tests.te.cases import ADAPTERS, CASES

WORKER = Path(__file__).with_name("worker_te_spec.py")
PACKAGES = REPOSITORY / ".venv-te"
TE_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
# The stub's own refusal, or that of torch's CPU build when Transformer Engine asks for a CUDA stream first.
REFUSALS = ("StubCalledError: ", "RuntimeError: Tried to instantiate dummy base class _cuda")
SPARSE = [case for case in CASES if "moe" in case]

Descriptions = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def te_packages() -> Path:
    """The folder with Transformer Engine's Python half: as `make setup-te-test` makes it, if it is not there yet."""
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", "scripts/setup_folder.sh", "te", "te-test"]
    made = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, f"tests/te need the packages of requirements/te-test.txt\n{made.stderr}"
    return PACKAGES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, te_packages: Path) -> Path:
    folder = tmp_path_factory.mktemp("te")
    for i, (case, (model, tied)) in enumerate(CASES.items()):
        directory = write_model(folder / case, model.family, tied=tied, seed=i, num_hidden_layers=4, **model.shape)
        weights = tensors_of(directory)
        dtype = getattr(torch, model.dtype)
        save_file({name: x.to(dtype) for name, x in weights.items()}, directory / "model.safetensors")
    path = os.pathsep.join([str(REPOSITORY), str(te_packages)])
    run_ranks(WORKER, 1, [folder, "local"], timeout=120)
    run_ranks(WORKER, 2, [folder, "te", "local"], timeout=120, env={"PYTHONPATH": path}, kind="fresh")
    (folder / "local").rename(folder / "first_local")
    run_ranks(WORKER, 1, [folder, "local", "te"], timeout=120)
    return folder


@pytest.fixture(scope="module")
def te(folder: Path) -> Descriptions:
    return json.loads((folder / "te.json").read_text())


@pytest.fixture(scope="module")
def local(folder: Path) -> Descriptions:
    return json.loads((folder / "local.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_transformer_engines_modules_are_taken_where_it_is_installed(
    te: Descriptions, local: Descriptions, case: str
) -> None:
    sparse_layers = {"qwen3_moe": 4, "qwen3_moe, mixed": 3}.get(case, 0)
    assert te[case]["modules"] == {
        "qkv": "TELayerNormColumnParallelLinear",
        "attention": "TEDotProductAttention",
        "experts": ["TEGroupedMLP"] * sparse_layers,
        "final norm": "transformer_engine",
    }
    assert local[case]["modules"] == {
        "qkv": "ColumnParallelLinear",
        "attention": "PackedSdpaAttention",
        "experts": ["SequentialMLP"] * sparse_layers,
        "final norm": "prune_opd",
    }


@pytest.mark.parametrize("case", CASES)
def test_only_the_local_modules_run_without_a_gpu(te: Descriptions, local: Descriptions, case: str) -> None:
    assert te[case]["forward"].startswith(REFUSALS)
    assert local[case]["forward"] == "[4, 64]"


@pytest.mark.parametrize("case", CASES)
def test_the_mapping_covers_exactly_transformer_engines_parameters(te: Descriptions, case: str) -> None:
    assert sorted(te[case]["mapped"]) == sorted(te[case]["entries"])
    assert len(te[case]["own names"]) == len(te[case]["entries"])
    beside = te[case]["beside parameters"]
    assert beside and all(name.endswith("_extra_state") for name in beside)  # no weights, and not mapped


@pytest.mark.parametrize("case", ADAPTERS)
def test_a_layer_with_adapters_has_its_norms_apart_and_the_same_names(folder: Path, case: str) -> None:
    te, local = (json.loads((folder / f"{side}_adapters.json").read_text())[case] for side in ("te", "local"))
    assert (te["qkv"], te["norm"]) == ("TEColumnParallelLinear", "transformer_engine")
    assert (local["qkv"], local["norm"]) == ("ColumnParallelLinear", "prune_opd")
    assert te["own"] == te["entries"] == local["own"] == local["entries"]
    assert te["trained"] == local["trained"] == [name for name in te["own"] if ".adapter." in name]
    assert te["sharded"].keys() == local["sharded"].keys()  # two ranks and one: other shapes
    assert local["forward"] == "[4, 64]"
    assert te["forward"].startswith(REFUSALS)


@pytest.mark.parametrize("case", CASES)
def test_transformer_engine_fuses_norms_and_groups_experts(te: Descriptions, case: str) -> None:
    """Or the names above would be megatron-core's own, and nothing would have been translated."""
    names = {name.removeprefix("decoder.layers.3.") for name in te[case]["own names"]}
    assert "self_attention.linear_qkv.layer_norm_weight" in names and "input_layernorm.weight" not in names
    if case in SPARSE:
        assert {f"mlp.experts.linear_fc{n}.weight{i}" for n in (1, 2) for i in range(4)} <= names
    else:
        assert "mlp.linear_fc1.layer_norm_weight" in names


@pytest.mark.parametrize("case", CASES)
def test_shapes_are_half_of_the_local_ones_over_two_ranks(te: Descriptions, local: Descriptions, case: str) -> None:
    """But for norms and routers, and for experts, which are spread over ranks as a whole."""
    ours, theirs = te[case]["mapped"], local[case]["mapped"]
    assert ours.keys() == theirs.keys()
    for name, shape in ours.items():
        ratio = 1 if any(whole in name for whole in ("norm", "router", "experts")) else 2
        assert math.prod(shape) * ratio == math.prod(theirs[name]), name


@pytest.mark.parametrize("case", CASES)
def test_both_scale_attention_alike(te: Descriptions, local: Descriptions, case: str) -> None:
    assert te[case]["softmax scale"] == pytest.approx(local[case]["softmax scale"] or 32**-0.5)
    assert (local[case]["softmax scale"] is not None) == (case == "qwen2")  # the one with yarn


@pytest.mark.parametrize("case", CASES)
def test_sharded_checkpoints_have_the_same_keys_and_shapes(te: Descriptions, local: Descriptions, case: str) -> None:
    assert len(te[case]["sharded"]) > 5
    assert te[case]["sharded"] == local[case]["sharded"]


@pytest.mark.parametrize("written", ["te/{}/hf", "local/{}/hf", "te/{}/from_local", "local/{}/from_te"])
@pytest.mark.parametrize("case", CASES)
def test_the_directorys_tensors_come_back_bit_for_bit(folder: Path, case: str, written: str) -> None:
    """Straight out of either model, and after a checkpoint of the other: from one rank to two, and back."""
    ours, theirs = (tensors_of(path) for path in (folder / written.format(case), folder / case))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_the_other_side_leaves_no_weight_out(te: Descriptions, local: Descriptions, case: str) -> None:
    assert all("_extra_state" in name for name in te[case]["not loaded"])
    assert local[case]["not loaded"] == []


@pytest.mark.parametrize("name", ["rmsnorm_fwd", "CommOverlap"])
def test_whatever_of_the_stub_is_called_raises(name: str) -> None:
    with pytest.raises(stub.StubCalledError, match=f"transformer_engine_torch.{name} is a stub: it has no kernel"):
        getattr(stub.StubModule("transformer_engine_torch"), name)(1, x=2)


def test_the_normal_environment_does_not_see_transformer_engine() -> None:
    """megatron-core would take it, and its kernels are not there."""
    import importlib.util

    assert importlib.util.find_spec("transformer_engine") is None
