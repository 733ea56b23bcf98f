"""Weight files that did not arrive whole are found by `prune-opd check`, before a job has its GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from prune_opd.check.run import check_everything
from prune_opd.check.weights import weight_problems
from prune_opd.config import TrainConfig
from prune_opd.errors import ConfigError
from prune_opd.model_spec import ModelSpec
from prune_opd.weights.load import SafetensorsDirectory, two_heads
from prune_opd.weights.mapping import EMBEDDING, HEAD
from tests.fake_models import settings_of, train_config, with_weights, write_model

MOE = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def change_index(model: Path, change: Any) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def change_file(model: Path, change: Any) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def found(model: Path) -> list[str]:
    return weight_problems("student", model, settings_of(model))


def truncate(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


UP = "model.layers.1.mlp.up_proj.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
SHARDED = {
    "is missing": lambda m: (m / "model-00001.safetensors").unlink(),
    f"no tensor '{UP}'": lambda m: change_index(m, lambda names: names.pop(UP)),
    "safetensors, which lacks it: copy the model again": lambda m: change_index(
        m, lambda names: names.update({UP: next(name for name in names.values() if name != names[UP])})
    ),
    "model.safetensors.index.json cannot be read": lambda m: truncate(m / "model.safetensors.index.json", 0.5),
    "AttributeError(": lambda m: (m / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}'),
    "TypeError(": lambda m: (m / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}'),
    "model-00000.safetensors is a Git LFS pointer": lambda m: (m / "model-00000.safetensors").write_text(POINTER),
}


def change_header(model: Path, change: Any) -> None:
    """The header of the one file anew; what is behind it stays."""
    path = model / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


SINGLE = {
    "a header that cannot be read (KeyError": lambda m: change_header(m, lambda h: h.update({UP: {}})),
    "a header that cannot be read (TypeError": lambda m: change_header(m, lambda h: h.update({UP: None})),
    "cannot be read": lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes() + b"more"),
    "is a Git LFS pointer": lambda m: (m / "model.safetensors").write_text(POINTER),
    "bytes behind its header where": lambda m: truncate(m / "model.safetensors", 0.5),
    "fewer than its header": lambda m: truncate(m / "model.safetensors", 0.001),
    "has 0 bytes": lambda m: truncate(m / "model.safetensors", 0),
    "no model.safetensors and no index": lambda m: (m / "model.safetensors").unlink(),
    f"tensor '{UP}' has shape [96, 32], but config.json asks for [96, 64]": lambda m: change_file(
        m, lambda t: t.update({UP: t[UP][:, :32].clone()})
    ),
    "set tie_word_embeddings to true": lambda m: change_file(m, lambda t: t.pop(HEAD)),
}


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, MOE, {"model_type": "llama"}])
@pytest.mark.parametrize("files", [1, 3])
def test_whole_weights_are_fine(files: int, changes: dict[str, Any], tmp_path: Path) -> None:
    assert found(with_weights(write_model(tmp_path / "model", **changes), files)) == []


@pytest.mark.parametrize("problem", SHARDED)
def test_a_set_of_files_that_is_not_whole_is_refused(problem: str, tmp_path: Path) -> None:
    model = with_weights(write_model(tmp_path / "model"), files=3)
    SHARDED[problem](model)
    (line,) = found(model)
    assert line.startswith(f"student = '{model}': ") and problem in line


@pytest.mark.parametrize("problem", SINGLE)
def test_a_file_that_is_not_whole_is_refused(problem: str, tmp_path: Path) -> None:
    model = with_weights(write_model(tmp_path / "model"))
    SINGLE[problem](model)
    (line,) = found(model)
    assert line.startswith(f"student = '{model}': ") and problem in line


def test_a_head_that_a_tied_model_should_not_have_is_refused_and_a_copy_is_not(tmp_path: Path) -> None:
    model = with_weights(write_model(tmp_path / "model", tie_word_embeddings=True))
    change_file(model, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert found(model) == []
    change_file(model, lambda tensors: tensors[HEAD][31].add_(1))
    (line,) = found(model)
    assert "is not the embedding, and config.json says tie_word_embeddings = true: set it to false" in line
    assert two_heads(SafetensorsDirectory(model), ModelSpec.of(settings_of(model), "model"))  # as the loader does
    change_file(model, lambda tensors: tensors.pop(EMBEDDING))
    (line,) = found(model)
    assert f"no tensor '{EMBEDDING}', only '{HEAD}'" in line


def test_check_names_both_models_and_train_refuses_two_heads(tmp_path: Path) -> None:
    models = [with_weights(write_model(tmp_path / name)) for name in ("student", "teacher")]
    config: TrainConfig = train_config(*models)
    assert not any("tensor" in line for line in check_everything(config, 2, tmp_path / "run", "auto"))
    for model in models:
        change_file(model, lambda tensors: tensors.pop(UP))
    lines = [line for line in check_everything(config, 2, tmp_path / "run", "auto") if UP in line]
    assert [line.split(" = ")[0] for line in lines] == ["student", "teacher"]


def test_the_loader_says_the_same_of_a_missing_tensor(tmp_path: Path) -> None:
    model = with_weights(write_model(tmp_path / "model"))
    change_file(model, lambda tensors: tensors.pop(HEAD))
    with pytest.raises(ConfigError, match="set tie_word_embeddings to true"):
        SafetensorsDirectory(model).shape(HEAD)


def test_the_checks_of_a_train_command_import_no_torch(tmp_path: Path) -> None:
    """It stays beside its ranks for the whole run: 2.5 CPU seconds and 200 MB."""
    text = f"""
import sys
from pathlib import Path
from prune_opd.check.run import check_everything
from prune_opd.cli import main
from prune_opd.config.recipe import load_recipe
print(check_everything(load_recipe("tiny_compatible"), 2, Path({str(tmp_path / "run")!r}), "auto"))
print(sorted({{"torch", "transformers", "vllm", "matplotlib", "wandb"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n[]\n"
