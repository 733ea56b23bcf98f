"""Names and cuts: what is read as shards comes back as the same Hugging Face tensors, and nothing is left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from prune_opd import platform
from prune_opd.model_spec import MoeSpec
from prune_opd.weights.mapping import Entry, entries, merge_shards, read_shard
from tests.models import FAMILIES, write_model

TP_SIZES = (1, 2, 4)
CUTS = {"whole", "vocab", "columns", "qkv", "gate_up"}


def model_spec(**changes: Any) -> Any:
    """Eight heads in four KV groups, so that TP = 4 divides; 300 vocabulary entries, so that every TP size pads."""
    platform.prepare()
    from prune_opd.model_spec import ModelSpec, RopeSpec

    settings = {
        "family": "qwen3",
        "layers": 2,
        "hidden": 12,
        "ffn": 20,
        "heads": 8,
        "kv_heads": 4,
        "head_dim": 3,
        "vocab_size": 300,
        "max_positions": 64,
        "rope": RopeSpec(1e4),
        "norm_eps": 1e-6,
        "tied": True,
        "qkv_bias": False,
        "qk_norm": True,
    }
    return ModelSpec(**(settings | changes))


def hf_tensors(spec: Any) -> dict[str, Tensor]:
    """Every Hugging Face tensor of `spec`, no two numbers alike."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    tensors: dict[str, Tensor] = {}
    first = 0
    for name in (name for entry in entries(spec) for name in entry.hf):
        module, what = name.split(".")[-2:]
        ffn = spec.moe.ffn if ".experts." in name else spec.ffn
        rows_of = {"q_proj": q, "k_proj": kv, "v_proj": kv, "gate_proj": ffn, "up_proj": ffn}
        if spec.moe:
            rows_of["gate"] = spec.moe.experts
        if module in rows_of:
            shape = [rows_of[module], spec.hidden] if what == "weight" else [rows_of[module]]
        elif module == "o_proj":
            shape = [spec.hidden, q]
        elif module == "down_proj":
            shape = [spec.hidden, ffn]
        elif module in ("embed_tokens", "lm_head"):
            shape = [spec.vocab_size, spec.hidden]
        else:
            shape = [spec.head_dim if module in ("q_norm", "k_norm") else spec.hidden]
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(first, first + count, dtype=torch.float64).view(shape) + 1
        first += count
    return tensors


def shards_of(entry: Entry, spec: Any, tensors: dict[str, Tensor], size: int) -> list[Tensor]:
    def rows(name: str, first: int, end: int) -> Tensor:
        return tensors[name][first:end]

    def columns(name: str, first: int, end: int) -> Tensor:
        return tensors[name][:, first:end]

    end = tensors[entry.hf[0]].shape[1 if entry.cut == "columns" else 0]
    return [read_shard(entry, spec, rank, size, rows, columns, end) for rank in range(size)]


SPECS = {
    "qwen3 tied": {},
    "qwen2 bias, untied": {"family": "qwen2", "qkv_bias": True, "qk_norm": False, "tied": False},
    "llama, no groups": {"family": "llama", "qk_norm": False, "kv_heads": 8},
    "experts": {"family": "qwen3_moe", "moe": MoeSpec(3, 2, 8, True, (True, True))},
    "experts in one layer": {"family": "qwen3_moe", "moe": MoeSpec(2, 1, 28, False, (False, True))},
    "vocabulary that needs no padding": {"vocab_size": 512, "tied": False},
}


@pytest.mark.parametrize("size", TP_SIZES)
@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS)
def test_merging_the_shards_gives_the_tensors_that_were_read(changes: dict[str, Any], size: int) -> None:
    spec = model_spec(**changes)
    tensors = hf_tensors(spec)
    back: dict[str, Tensor] = {}
    for entry in entries(spec):
        for name, tensor in merge_shards(entry, spec, shards_of(entry, spec, tensors, size)):
            assert tensor.is_contiguous(), name
            back[name] = tensor
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert {entry.cut for entry in entries(spec)} == CUTS


@pytest.mark.parametrize("size", TP_SIZES)
@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS)
def test_the_ranks_get_equal_shapes_and_together_every_number_once(changes: dict[str, Any], size: int) -> None:
    spec = model_spec(**changes)
    tensors = hf_tensors(spec)
    for entry in entries(spec):
        shards = shards_of(entry, spec, tensors, size)
        assert len({shard.shape for shard in shards}) == 1
        if entry.cut == "whole":
            assert all(torch.equal(shard, shards[0]) for shard in shards)
            continue
        numbers = torch.cat([shard.flatten() for shard in shards])
        expected = torch.cat([tensors[name].flatten() for name in entry.hf])
        assert torch.equal(numbers[numbers > 0].sort().values, expected.sort().values), entry


@pytest.mark.parametrize("size", TP_SIZES)
def test_padding_rows_of_the_vocabulary_are_zero_and_come_last(size: int) -> None:
    spec = model_spec(vocab_size=100)  # with TP = 2 and 4 the last ranks have nothing but padding
    tensors = hf_tensors(spec)
    entry = next(entries(spec))
    whole = torch.cat(shards_of(entry, spec, tensors, size))
    assert len(whole) == spec.padded_vocab(size) == 128 * size
    assert torch.equal(whole[:100], tensors["model.embed_tokens.weight"])
    assert not whole[100:].any()


def test_a_kv_group_keeps_its_queries_key_and_value_next_to_each_other() -> None:
    """megatron's layout, head by head: [q q k v] of group 0, then of group 1, …; a rank holds whole groups."""
    spec = model_spec(qkv_bias=True)
    entry = next(e for e in entries(spec) if e.megatron == "decoder.layers.0.self_attention.linear_qkv.bias")
    heads = {"q": spec.heads, "k": spec.kv_heads, "v": spec.kv_heads}
    tensors = {
        name: torch.arange(heads[x]).repeat_interleave(spec.head_dim) + 100 * i
        for i, (x, name) in enumerate(zip("qkv", entry.hf, strict=True))
    }
    second_of_two = shards_of(entry, spec, tensors, 2)[1].view(-1, spec.head_dim)[:, 0].tolist()
    assert second_of_two == [4, 5, 102, 202, 6, 7, 103, 203]


def test_a_rank_keeps_the_gate_above_the_up_projection_of_the_same_columns() -> None:
    spec = model_spec()
    entry = next(e for e in entries(spec) if e.cut == "gate_up")
    tensors = hf_tensors(spec)
    gate, up = (tensors[name] for name in entry.hf)
    assert torch.equal(shards_of(entry, spec, tensors, 2)[1], torch.cat([gate[10:], up[10:]]))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_entries_name_exactly_the_tensors_that_transformers_saves(tmp_path: Path, family: str, tied: bool) -> None:
    platform.prepare()
    from prune_opd.model_spec import ModelSpec

    directory = write_model(tmp_path / "model", family, tied=tied)
    named = [name for entry in entries(ModelSpec.read(directory)) for name in entry.hf]
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert sorted(named) == sorted(file.keys())


def test_every_megatron_parameter_is_named_once() -> None:
    def names(**changes: Any) -> Iterator[str]:
        return (entry.megatron for entry in entries(model_spec(**changes)))

    for changes in SPECS.values():
        assert len(set(names(**changes))) == len(list(names(**changes)))
