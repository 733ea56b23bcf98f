"""Model directories on disk: what is written is read back bit for bit, and a broken one gets one clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prune_opd.errors import ConfigError
from prune_opd.weights.files import HfDirectoryWriter
from prune_opd.weights.load import SafetensorsDirectory
from tests.distributed.ranks import run_ranks
from tests.models import write_model

WORKER = Path(__file__).with_name("worker_files.py")
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "good", "qwen2", tied=False)


# ---------------------------------------------------------------------------------------------------- writing


def write(out: Path, source: Path, tensors: dict[str, Tensor], max_file_bytes: int) -> Path:
    writer = HfDirectoryWriter(out, source, max_file_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    return out


def test_others_may_read_what_the_umask_lets_them(model: Path, tmp_path: Path) -> None:
    out = write(tmp_path / "out", model, {"weight": torch.zeros(3)}, 1000)
    modes = {path.name: path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert modes[WEIGHTS] == modes["config.json"] == out.stat().st_mode & 0o666


def test_a_sharded_directory_is_read_back_bit_for_bit(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    limit = 40_000
    assert max(tensor.nbytes for tensor in tensors.values()) > limit  # a tensor above the limit has a file of its own
    out = write(tmp_path / "out", model, tensors, limit)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for file in files:
        held = load_file(out / file)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= limit
    back = SafetensorsDirectory(out)
    assert back.file_of.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back.shape(name) == tuple(tensor.shape)
        assert torch.equal(back.read(name, 0, 0, len(tensor)), tensor)
        if tensor.ndim == 2:
            assert torch.equal(back.read(name, 1, 3, 20), tensor[:, 3:20])


def test_transformers_loads_a_sharded_directory_with_config_and_tokenizer(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tensors = load_file(model / WEIGHTS)
    out = write(tmp_path / "out", model, tensors, 40_000)
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(model).get_vocab()


def test_bfloat16_weights_in_one_file_need_no_index(model: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(model / WEIGHTS).items()}
    out = write(tmp_path / "out", model, tensors, 2**30)
    assert [path.name for path in out.glob("model*")] == [WEIGHTS]
    back = load_file(out / WEIGHTS)
    assert all(back[name].dtype == torch.bfloat16 and torch.equal(back[name], tensors[name]) for name in tensors)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16", "loaders take the dtype from there"


def test_a_tensor_that_changes_after_it_was_added_is_written_as_it_was(model: Path, tmp_path: Path) -> None:
    parameter = torch.zeros(3)
    writer = HfDirectoryWriter(tmp_path / "out", model, 2**30)
    writer.add("x", parameter)
    parameter += 1
    writer.finish()
    assert not load_file(tmp_path / "out" / WEIGHTS)["x"].any()


def test_the_directory_appears_only_when_complete_and_the_old_one_stays_until_then(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    writer = HfDirectoryWriter(out, model, 10)
    writer.add("a", torch.ones(4))
    writer.add("b", torch.ones(4))
    assert not out.exists()
    writer.finish()
    assert not writer.partial.exists()

    killed = HfDirectoryWriter(out, model, 10)
    killed.add("a", torch.zeros(4))
    killed.add("b", torch.zeros(4))  # "a" is on disk now, and nobody finishes
    assert SafetensorsDirectory(out).read("a", 0, 0, 4).all()

    write(out, model, {"c": torch.ones(4)}, 10)  # the leftover does not get in the way, nor do files of the old one
    assert sorted(path.name for path in out.glob("model*")) == [WEIGHTS]
    assert SafetensorsDirectory(out).file_of == {"c": WEIGHTS}


# ---------------------------------------------------------------------------------------------------- broken input


def replaced(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    """Write the directory's weights with one tensor changed (None: left out)."""

    def apply(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        new = change(tensors.pop(name))
        save_file(tensors if new is None else {**tensors, name: new}, directory / WEIGHTS)

    return apply


def without_a_file(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    write(directory, shutil.copytree(directory, directory.with_name("source")), tensors, 100_000)
    next(directory.glob("model-00002-of-*")).unlink()


def cut_short(directory: Path) -> None:
    whole = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(whole[: len(whole) // 2])


LAYER = "model.layers.1."
# What is done to a good directory, and what the error must say. A larger tensor matters as much as a smaller one: a
# slice of it has the right shape.
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (replaced(LAYER + "mlp.up_proj.weight", lambda x: None), f"no tensor '{LAYER}mlp.up_proj.weight'"),
    "no head": (replaced("lm_head.weight", lambda x: None), "no tensor 'lm_head.weight'"),
    "vocab+": (
        replaced("lm_head.weight", lambda x: torch.cat([x, x[:1]])),
        "'lm_head.weight' has shape [200, 64], but config.json asks for [199, 64]",
    ),
    "vocab-": (
        replaced("model.embed_tokens.weight", lambda x: x[:-1].clone()),
        "'model.embed_tokens.weight' has shape [198, 64], but config.json asks for [199, 64]",
    ),
    "qkv+": (
        replaced(LAYER + "self_attn.k_proj.weight", lambda x: torch.cat([x, x])),
        f"'{LAYER}self_attn.k_proj.weight' has shape [128, 64], but config.json asks for [64, 64]",
    ),
    "qkv bias-": (
        replaced(LAYER + "self_attn.q_proj.bias", lambda x: x[:32].clone()),
        f"'{LAYER}self_attn.q_proj.bias' has shape [32], but config.json asks for [128]",
    ),
    "gate_up+": (
        replaced(LAYER + "mlp.gate_proj.weight", lambda x: torch.cat([x, x])),
        f"'{LAYER}mlp.gate_proj.weight' has shape [192, 64], but config.json asks for [96, 64]",
    ),
    "gate_up width": (
        replaced(LAYER + "mlp.gate_proj.weight", lambda x: torch.cat([x, x], dim=1)),
        f"'{LAYER}mlp.gate_proj.weight' has shape [96, 128], but config.json asks for [96, 64]",
    ),
    "columns-": (
        replaced(LAYER + "mlp.down_proj.weight", lambda x: x[:, :64].clone()),
        f"'{LAYER}mlp.down_proj.weight' has shape [64, 64], but config.json asks for [64, 96]",
    ),
    "norm": (
        replaced("model.norm.weight", lambda x: x[:32].clone()),
        "'model.norm.weight' has shape [32], but config.json asks for [64]",
    ),
    "a file of the index is missing": (without_a_file, "model-00002-of-"),
    "a file cut short": (cut_short, f"{WEIGHTS} cannot be read"),
    "no weights": (lambda directory: (directory / WEIGHTS).unlink(), "no model.safetensors and no index of one"),
}


@pytest.fixture(scope="module")
def raised(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What loading each broken directory into a megatron-core model raised. One process for all of them."""
    folder = tmp_path_factory.mktemp("broken")
    directories = {name: folder / str(i) / "model" for i, name in enumerate(BROKEN)}
    for name, directory in directories.items():
        shutil.copytree(model, directory)
        BROKEN[name][0](directory)
    run_ranks(WORKER, 1, [folder / "raised.json", model, *directories.values()], timeout=90)
    messages = json.loads((folder / "raised.json").read_text())
    return {name: messages[str(directory)] for name, directory in directories.items()}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_directory_gets_one_error_that_names_what_is_wrong(raised: dict[str, str], name: str) -> None:
    assert BROKEN[name][1] in raised[name]
    assert "\n" not in raised[name]


def test_a_name_that_is_not_there_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"good: no tensor 'model\.nothing'; is config\.json from another"):
        SafetensorsDirectory(model).read("model.nothing", 0, 0, 1)
