"""Hugging Face ↔ megatron-core: names, shapes and cuts of every weight. Llama, Qwen2, Qwen3, Qwen3-MoE.

One `Entry` per megatron parameter. Three are more than a slice of one tensor: megatron keeps q, k and v of one KV group
next to each other in one matrix, keeps gate and up of a rank's columns in one matrix, and pads the vocabulary.
Transformer Engine's modules hold the same numbers in the same shapes under other names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from prune_opd.config import LoraConfig
from prune_opd.model_spec import ModelSpec
from prune_opd.weights.cut import COLUMNS, ROWS, VOCABULARY, WHOLE, Cut, Shape

if TYPE_CHECKING:  # `prune-opd check` reads names and shapes, without torch
    from torch.nn import Parameter

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # Hugging Face's names
LAYERS, EXPERTS = "decoder.layers.", "mlp.experts.local_experts."
# What Transformer Engine's modules call otherwise than megatron-core's own, whose names are the ones used here.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
GROUPED = re.compile(r"mlp\.experts\.(?P<linear>linear_fc[12])\.weight(?P<expert>\d+)")


@dataclass(frozen=True)
class Entry:
    """One megatron parameter and the Hugging Face tensors it is made of: their names and whole shapes."""

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]
    cut: Cut
    expert: int | None = None

    def shard_of(self, groups: Any) -> tuple[int, int]:
        """(index, count): which shard a rank of megatron's ProcessGroupCollection `groups` has, if it has one.

        Experts are divided over ranks by number: their weights lie whole on the ranks that have the expert.
        """
        if not self.cut.divided:
            return 0, 1
        over = groups.tp if self.expert is None else groups.expt_tp
        return over.rank(), over.size()


def entries(spec: ModelSpec) -> Iterator[Entry]:
    """Every parameter of the whole model, in the order in which the layers come; the same on every rank."""
    hidden, qkv_rows = spec.hidden, [heads * spec.head_dim for heads in (spec.heads, spec.kv_heads, spec.kv_heads)]
    kv_groups, vocabulary = Cut(groups=spec.kv_heads), ((spec.vocab_size, hidden),)
    norm, head_norm = ((hidden,),), ((spec.head_dim,),)
    yield Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary, VOCABULARY)
    for i in range(spec.layers):
        ours, theirs = f"{LAYERS}{i}.", f"model.layers.{i}."
        attention = theirs + "self_attn."
        yield Entry(ours + "input_layernorm.weight", (theirs + "input_layernorm.weight",), norm, WHOLE)
        for what in ("weight", "bias") if spec.qkv_bias else ("weight",):
            qkv = tuple(f"{attention}{x}_proj.{what}" for x in "qkv")
            shapes = tuple((rows, hidden) if what == "weight" else (rows,) for rows in qkv_rows)
            yield Entry(f"{ours}self_attention.linear_qkv.{what}", qkv, shapes, kv_groups)
        for x in "qk" if spec.qk_norm else "":
            yield Entry(
                f"{ours}self_attention.{x}_layernorm.weight", (f"{attention}{x}_norm.weight",), head_norm, WHOLE
            )
        o_proj = ((hidden, qkv_rows[0]),)
        yield Entry(ours + "self_attention.linear_proj.weight", (attention + "o_proj.weight",), o_proj, COLUMNS)
        yield Entry(ours + "pre_mlp_layernorm.weight", (theirs + "post_attention_layernorm.weight",), norm, WHOLE)
        if spec.moe and spec.is_sparse(i):
            router = ((spec.moe.experts, hidden),)
            yield Entry(ours + "mlp.router.weight", (theirs + "mlp.gate.weight",), router, WHOLE)
            for e in range(spec.moe.experts):
                one = (f"{ours}{EXPERTS}{e}.", f"{theirs}mlp.experts.{e}.")
                yield from _feed_forward(*one, hidden, spec.moe.ffn, e)
        else:
            yield from _feed_forward(ours + "mlp.", theirs + "mlp.", hidden, spec.ffn)
    yield Entry("decoder.final_layernorm.weight", ("model.norm.weight",), norm, WHOLE)
    if not spec.tied:
        yield Entry("output_layer.weight", ("lm_head.weight",), vocabulary, VOCABULARY)


def _feed_forward(ours: str, theirs: str, hidden: int, ffn: int, expert: int | None = None) -> Iterator[Entry]:
    gate_up = (theirs + "gate_proj.weight", theirs + "up_proj.weight")
    yield Entry(ours + "linear_fc1.weight", gate_up, ((ffn, hidden), (ffn, hidden)), ROWS, expert)
    yield Entry(ours + "linear_fc2.weight", (theirs + "down_proj.weight",), ((hidden, ffn),), COLUMNS, expert)


class ModelChunk(Protocol):
    """A megatron-core GPT model, or a pipeline stage's chunk of one, as far as its weights go."""

    spec: ModelSpec
    lora: LoraConfig  # of the adapters that its layers have; off: none
    pg_collection: Any  # megatron's ProcessGroupCollection
    decoder: Any  # its TransformerBlock
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


def missing(name: str, there: Collection[str]) -> str:
    """What to say of a Hugging Face tensor that is not among those that are there."""
    if name == HEAD and EMBEDDING in there:
        hint = ": if the model shares the embedding with its head, set tie_word_embeddings to true in config.json"
    elif name == EMBEDDING and HEAD in there:
        hint = f", only {HEAD!r}: save the model again with transformers, which writes the embedding"
    else:
        hint = "; is config.json from another model, or is a file missing?"
    return f"no tensor {name!r}{hint}"
