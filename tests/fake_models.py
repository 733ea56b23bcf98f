"""Hugging Face directories with the files that the checks read, with weights on request; a config that passes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prune_opd.config import (
    GateConfig,
    HorizonConfig,
    ObjectiveConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    TrainConfig,
)

TOKENS = ("<bos>", "<eos>", *(f"w{i}" for i in range(30)))


def tokenizer(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json with 32 tokens, two of them special; `changes` replace entries of its model."""
    special = [{"id": i, "content": TOKENS[i], "special": True} for i in range(2)]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(TOKENS)}, "merges": [["w", "1"], ["w", "2"]]}
    return {"added_tokens": special, "model": model | changes}


def write_model(directory: Path, its_tokenizer: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A model directory; `changes` replace settings of its config.json, `its_tokenizer` its tokenizer.json."""
    settings = {
        "model_type": "qwen3",
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "vocab_size": len(TOKENS),
    }
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(settings | changes), encoding="utf-8")
    (directory / "tokenizer.json").write_text(json.dumps(its_tokenizer or tokenizer()), encoding="utf-8")
    return directory


def settings_of(model: Path) -> dict[str, Any]:
    return dict(json.loads((model / "config.json").read_text(encoding="utf-8")))


def with_weights(model: Path, files: int = 1) -> Path:
    """The model with random weights, in so many files."""
    import torch
    from safetensors.torch import save_file

    from prune_opd.model_spec import ModelSpec
    from prune_opd.weights.mapping import entries

    spec = ModelSpec.of(settings_of(model), str(model))
    shapes = {name: shape for entry in entries(spec) for name, shape in zip(entry.hf, entry.shapes, strict=True)}
    tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    if files == 1:
        save_file(tensors, model / "model.safetensors")
        return model
    file_of = {name: f"model-{i % files:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(file_of.values()):
        save_file({name: tensors[name] for name in tensors if file_of[name] == file}, model / file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    return model


def train_config(student: Path, teacher: Path, **changes: Any) -> TrainConfig:
    """A run that the checks let pass on two ranks; `changes` replace whole parts."""
    settings: dict[str, Any] = {
        "name": "fake",
        "student": str(student),
        "teacher": str(teacher),
        "steps": 3,
        "horizon": HorizonConfig(strategy="prune", max_len=256, min_len=32, init_len=64),
        "gate": GateConfig(k=4),
        "objective": ObjectiveConfig(k=16),
        "rollout": RolloutConfig(prompts=4, responses=2, max_prompt_len=64),
        "parallel": ParallelConfig(nproc=2),
        "precision": PrecisionConfig(params="fp32"),
    }
    return TrainConfig(**(settings | changes))
