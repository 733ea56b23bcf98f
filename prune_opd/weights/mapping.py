"""Hugging Face ↔ megatron-core: names, and how each weight is cut over ranks. Llama, Qwen2, Qwen3, Qwen3-MoE.

One `Entry` per megatron parameter. Three layouts are more than a slice: megatron keeps q, k and v of one KV group
next to each other in one matrix, keeps gate and up of a rank's columns in one matrix, and pads the vocabulary.
Transformer Engine's modules hold the same numbers in the same shapes under other names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from prune_opd.model_spec import ModelSpec

LAYERS, EXPERTS = "decoder.layers.", "mlp.experts.local_experts."
# What Transformer Engine's modules call otherwise than megatron-core's own, whose names are the ones used here.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
GROUPED = re.compile(r"mlp\.experts\.(?P<linear>linear_fc[12])\.weight(?P<expert>\d+)")
ReadRows = Callable[[str, int, int], Tensor]  # (Hugging Face name, first row, end row) -> those rows
ReadColumns = Callable[[str, int, int], Tensor]


@dataclass(frozen=True)
class Entry:
    """One megatron parameter and the Hugging Face tensors it is made of.

    An expert's weights lie whole on the ranks that have the expert.
    """

    megatron: str
    hf: tuple[str, ...]
    cut: str  # whole | vocab | columns | qkv | gate_up
    expert: int | None = None


def entries(spec: ModelSpec) -> Iterator[Entry]:
    """Every parameter of the whole model, in the order in which the layers come; the same on every rank."""
    yield Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab")
    for i in range(spec.layers):
        ours, theirs = f"{LAYERS}{i}.", f"model.layers.{i}."
        attention = theirs + "self_attn."
        yield Entry(ours + "input_layernorm.weight", (theirs + "input_layernorm.weight",), "whole")
        for what in ("weight", "bias") if spec.qkv_bias else ("weight",):
            qkv = tuple(f"{attention}{x}_proj.{what}" for x in "qkv")
            yield Entry(f"{ours}self_attention.linear_qkv.{what}", qkv, "qkv")
        if spec.qk_norm:
            for x in "qk":
                yield Entry(f"{ours}self_attention.{x}_layernorm.weight", (f"{attention}{x}_norm.weight",), "whole")
        yield Entry(ours + "self_attention.linear_proj.weight", (attention + "o_proj.weight",), "columns")
        yield Entry(ours + "pre_mlp_layernorm.weight", (theirs + "post_attention_layernorm.weight",), "whole")
        if spec.moe and spec.is_sparse(i):
            yield Entry(ours + "mlp.router.weight", (theirs + "mlp.gate.weight",), "whole")
            for e in range(spec.moe.experts):
                yield from _feed_forward(f"{ours}{EXPERTS}{e}.", f"{theirs}mlp.experts.{e}.", e)
        else:
            yield from _feed_forward(ours + "mlp.", theirs + "mlp.")
    yield Entry("decoder.final_layernorm.weight", ("model.norm.weight",), "whole")
    if not spec.tied:
        yield Entry("output_layer.weight", ("lm_head.weight",), "vocab")


def _feed_forward(ours: str, theirs: str, expert: int | None = None) -> Iterator[Entry]:
    gate_up = (theirs + "gate_proj.weight", theirs + "up_proj.weight")
    yield Entry(ours + "linear_fc1.weight", gate_up, "gate_up", expert)
    yield Entry(ours + "linear_fc2.weight", (theirs + "down_proj.weight",), "columns", expert)


class ModelChunk(Protocol):
    """What is asked of a model, or of a pipeline stage's chunk of one (`megatron.model.HiddenStatesGPT`)."""

    spec: ModelSpec
    pg_collection: Any
    decoder: Any
    share_embeddings_and_output_weights: bool

    def parameters(self) -> Iterator[Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]: ...


def local_parameters(chunks: Sequence[ModelChunk]) -> dict[str, Parameter]:
    """This rank's parameters by the names of `entries`: layers and experts are numbered as in the whole model.

    The last stage's copy of a tied embedding goes by the embedding's name: it is that weight, held twice.
    """
    named: dict[str, Parameter] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            named[_global_name(chunk, name)] = parameter
    return named


def _global_name(chunk: ModelChunk, name: str) -> str:
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    if not name.startswith(LAYERS):
        return name
    local, _, rest = name.removeprefix(LAYERS).partition(".")
    layer = chunk.decoder.layers[int(local)]
    rest = FUSED_NORMS.get(rest, rest)
    if grouped := GROUPED.fullmatch(rest):
        rest = f"{EXPERTS}{grouped['expert']}.{grouped['linear']}.weight"
    if rest.startswith(EXPERTS):
        expert, _, rest = rest.removeprefix(EXPERTS).partition(".")
        first = chunk.pg_collection.ep.rank() * layer.mlp.num_local_experts
        rest = f"{EXPERTS}{first + int(expert)}.{rest}"
    return f"{LAYERS}{layer.layer_number - 1}.{rest}"


def read_shard(
    entry: Entry, spec: ModelSpec, rank: int, size: int, read_rows: ReadRows, read_columns: ReadColumns, end: int
) -> Tensor:
    """This rank's shard of a megatron parameter, reading only its part of each Hugging Face tensor.

    `end` is the length of the dimension that is cut (rows of the Hugging Face tensor, or its columns for "columns").
    """
    if entry.cut == "whole":
        return read_rows(entry.hf[0], 0, end)
    if entry.cut == "columns":
        part = end // size
        return read_columns(entry.hf[0], rank * part, (rank + 1) * part)
    if entry.cut == "vocab":
        part = spec.padded_vocab(size) // size
        first, last = min(rank * part, spec.vocab_size), min((rank + 1) * part, spec.vocab_size)
        rows = read_rows(entry.hf[0], first, last)
        return torch.cat([rows, rows.new_zeros(part - rows.shape[0], *rows.shape[1:])])
    if entry.cut == "gate_up":
        part = end // size
        return torch.cat([read_rows(name, rank * part, (rank + 1) * part) for name in entry.hf])
    groups = spec.kv_heads // size  # qkv
    sizes = [n * spec.head_dim for n in (spec.heads // spec.kv_heads, 1, 1)]
    parts = []
    for name, per_group in zip(entry.hf, sizes, strict=True):
        rows = read_rows(name, rank * groups * per_group, (rank + 1) * groups * per_group)
        parts.append(rows.unflatten(0, (groups, per_group)))
    return torch.cat(parts, dim=1).flatten(0, 1)


def merge_shards(entry: Entry, spec: ModelSpec, shards: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors, whole and contiguous, from every rank's shard (rank order)."""
    if entry.cut == "whole":
        yield entry.hf[0], shards[0]
    elif entry.cut == "columns":
        yield entry.hf[0], torch.cat(list(shards), dim=1)
    elif entry.cut == "vocab":
        yield entry.hf[0], torch.cat(list(shards))[: spec.vocab_size].contiguous()
    elif entry.cut == "gate_up":
        halves = [shard.chunk(2) for shard in shards]
        for name, half in zip(entry.hf, zip(*halves, strict=True), strict=True):
            yield name, torch.cat(half)
    else:
        per_group = (spec.heads // spec.kv_heads + 2) * spec.head_dim
        grouped = torch.cat(list(shards)).unflatten(0, (spec.kv_heads, per_group))
        sizes = [n * spec.head_dim for n in (spec.heads // spec.kv_heads, 1, 1)]
        for name, part in zip(entry.hf, grouped.split(sizes, dim=1), strict=True):
            yield name, part.flatten(0, 1).contiguous()
