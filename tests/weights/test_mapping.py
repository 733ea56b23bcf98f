"""Names and cuts: what is read as shards comes back as the same Hugging Face tensors, and nothing is left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prune_opd import platform
from prune_opd.model_spec import MoeSpec
from prune_opd.weights.cut import COLUMNS, ROWS, VOCABULARY, WHOLE, Cut
from prune_opd.weights.load import SafetensorsDirectory, read_shard
from prune_opd.weights.mapping import Entry, entries
from tests.models import FAMILIES, merged, tensors_of, write_model

TP_SIZES = (1, 2, 4)


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
    tensors: dict[str, Tensor] = {}
    first = 1
    for name, shape in (named for entry in entries(spec) for named in zip(entry.hf, entry.shapes, strict=True)):
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(first, first + count, dtype=torch.float64).view(shape)
        first += count
    return tensors


class InMemory(SafetensorsDirectory):
    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def read(self, name: str, dim: int, begin: int, end: int) -> Tensor:
        return self.tensors[name].narrow(dim, begin, end - begin)


def shards_of(entry: Entry, tensors: dict[str, Tensor], size: int) -> list[Tensor]:
    """Of each of `size` ranks. What is not cut, every rank has."""
    if entry.cut == WHOLE:
        return [read_shard(entry, InMemory(tensors), 0, 1)] * size
    return [read_shard(entry, InMemory(tensors), rank, size) for rank in range(size)]


def reference_shards(entry: Entry, spec: Any, tensors: dict[str, Tensor], size: int) -> list[Tensor]:
    """megatron's matrix in one piece, then cut: by the parameter's name, without a `Cut`."""
    first, *others = (tensors[name] for name in entry.hf)
    if "linear_qkv" in entry.megatron:
        of_groups = [tensor.unflatten(0, (spec.kv_heads, -1)) for tensor in (first, *others)]
        return list(torch.cat(of_groups, dim=1).flatten(0, 1).chunk(size))
    if "linear_fc1" in entry.megatron:
        (up,) = others
        return [torch.cat(halves) for halves in zip(first.chunk(size), up.chunk(size), strict=True)]
    if "linear" in entry.megatron:
        return list(first.chunk(size, dim=1))
    if entry.megatron in ("embedding.word_embeddings.weight", "output_layer.weight"):
        padding = first.new_zeros(spec.padded_vocab(size) - spec.vocab_size, spec.hidden)
        return list(torch.cat([first, padding]).chunk(size))
    return [first] * size


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
def test_a_rank_reads_its_part_of_megatrons_matrix(changes: dict[str, Any], size: int) -> None:
    spec = model_spec(**changes)
    tensors = hf_tensors(spec)
    for entry in entries(spec):
        found, expected = shards_of(entry, tensors, size), reference_shards(entry, spec, tensors, size)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True)), entry
        count = 1 if entry.cut == WHOLE else size
        assert {tuple(shard.shape) for shard in found} == {entry.cut.shape(entry.shapes, count)}
    assert {entry.cut for entry in entries(spec)} == {WHOLE, ROWS, COLUMNS, VOCABULARY, Cut(groups=spec.kv_heads)}


@pytest.mark.parametrize("size", TP_SIZES)
@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS)
def test_the_shards_parts_copied_to_their_places_make_the_whole_tensors(changes: dict[str, Any], size: int) -> None:
    """And they are views: of the shard's memory and of the whole tensors'."""
    spec = model_spec(**changes)
    tensors = hf_tensors(spec)
    back: dict[str, Tensor] = {}
    for entry in entries(spec):
        shards = reference_shards(entry, spec, tensors, size)
        back |= merged(entry, shards)
        for part in entry.cut.parts(shards[0], entry.shapes, 0, 1 if entry.cut == WHOLE else size):
            assert part.untyped_storage().data_ptr() == shards[0].untyped_storage().data_ptr()
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("size", TP_SIZES)
@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS)
def test_the_ranks_get_equal_shapes_and_together_every_number_once(changes: dict[str, Any], size: int) -> None:
    spec = model_spec(**changes)
    tensors = hf_tensors(spec)
    for entry in entries(spec):
        shards = shards_of(entry, tensors, size)
        assert len({shard.shape for shard in shards}) == 1
        if entry.cut == WHOLE:
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
    whole = torch.cat(shards_of(entry, tensors, size))
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
    second_of_two = shards_of(entry, tensors, 2)[1].view(-1, spec.head_dim)[:, 0].tolist()
    assert second_of_two == [4, 5, 102, 202, 6, 7, 103, 203]


def test_a_rank_keeps_the_gate_above_the_up_projection_of_the_same_columns() -> None:
    spec = model_spec()
    entry = next(e for e in entries(spec) if e.cut == ROWS)
    tensors = hf_tensors(spec)
    gate, up = (tensors[name] for name in entry.hf)
    assert torch.equal(shards_of(entry, tensors, 2)[1], torch.cat([gate[10:], up[10:]]))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_entries_are_exactly_the_tensors_that_transformers_saves(tmp_path: Path, family: str, tied: bool) -> None:
    platform.prepare()
    from prune_opd.model_spec import ModelSpec

    directory = write_model(tmp_path / "model", family, tied=tied)
    table = entries(ModelSpec.read(directory))
    named = [tensor for entry in table for tensor in zip(entry.hf, entry.shapes, strict=True)]
    assert sorted(named) == sorted((name, tuple(tensor.shape)) for name, tensor in tensors_of(directory).items())


def test_every_megatron_parameter_is_named_once() -> None:
    def names(**changes: Any) -> Iterator[str]:
        return (entry.megatron for entry in entries(model_spec(**changes)))

    for changes in SPECS.values():
        assert len(set(names(**changes))) == len(list(names(**changes)))
