"""Adapters as weights: how they are merged, and under which names `peft` gets them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from prune_opd.config import LoraConfig
from prune_opd.model_spec import ModelSpec
from prune_opd.plan.adapters import adapter_parameters
from prune_opd.weights.adapters import adapter_entries, has_adapter, merged, write_peft
from tests.fake_models import settings_of, write_model

LORA = LoraConfig(rank=4, alpha=8.0)
NAME = "decoder.layers.0.mlp.linear_fc2.weight"


def spec(tmp_path: Path) -> ModelSpec:
    return ModelSpec.of(settings_of(write_model(tmp_path / "model")), "model")


def parameters(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {NAME: (6, 10), NAME.replace("weight", "adapter.a"): (4, 10), NAME.replace("weight", "adapter.b"): (6, 4)}
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


def test_a_merged_weight_is_rounded_once() -> None:
    there = parameters(torch.bfloat16)
    weight, a, b = (tensor.double() for tensor in there.values())
    got = merged(NAME, there, LORA)
    assert got is not None and got.dtype == torch.bfloat16
    assert torch.equal(got, (weight + 2.0 * b @ a).float().to(torch.bfloat16))


def test_what_has_no_adapter_stays_the_parameter_itself() -> None:
    there = {"output_layer.weight": torch.ones(2, 2)}
    got = merged("output_layer.weight", there, LoraConfig())
    assert got is not None and got.data_ptr() == there["output_layer.weight"].data_ptr()
    assert merged(NAME, there, LORA) is None
    assert not has_adapter("output_layer.weight", there) and has_adapter(NAME, parameters(torch.float32))


def test_peft_gets_an_adapter_of_each_matrix_under_its_names(tmp_path: Path) -> None:
    model = spec(tmp_path)
    tensors = {
        name: torch.randn(shape)
        for entry in adapter_entries(model, LORA)
        for name, shape in zip(entry.hf, entry.shapes, strict=True)
    }
    assert sum(x.numel() for x in tensors.values()) == adapter_parameters(model, LORA)
    write_peft(tmp_path / "adapter", model, LORA, "the/student", tensors)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    matrices = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == matrices
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8.0, "the/student")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    attention = "base_model.model.model.layers.3.self_attn."
    assert len(saved) == 2 * model.layers * len(matrices)
    assert torch.equal(saved[f"{attention}q_proj.lora_A.weight"], saved[f"{attention}v_proj.lora_A.weight"])
    assert torch.equal(saved[f"{attention}v_proj.lora_B.weight"], tensors[f"{attention}v_proj.lora_B.weight"])


def test_only_the_targets_are_in_the_table(tmp_path: Path) -> None:
    table = list(adapter_entries(spec(tmp_path), LoraConfig(rank=4, targets=("linear_proj",))))
    assert [entry.megatron.partition("self_attention.")[2] for entry in table[:2]] == [
        "linear_proj.adapter.a",
        "linear_proj.adapter.b",
    ]
    assert len(table) == 2 * 4
