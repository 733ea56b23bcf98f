"""Parameters and floating-point operations of a model, whole and on one rank of a layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prune_opd.model_spec import ModelSpec


@dataclass(frozen=True)
class Count:
    """Parameters. experts: the ones that expert parallelism divides; dense: all others."""

    dense: int
    experts: int = 0

    @property
    def all(self) -> int:
        return self.dense + self.experts


@dataclass(frozen=True)
class ParallelSizes:
    """A model's parallel sizes, and the replicas of its dense weights."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    context: int = 1
    replicas: int = 1  # data parallel

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts: a stage's ranks divided by the expert parallel size."""
        return max(self.tensor * self.context * self.replicas // self.expert, 1)


def parameters(spec: ModelSpec) -> int:
    """Parameters in the Hugging Face directory: without padding, a tied head counted once."""
    heads = 1 if spec.tied else 2
    return heads * spec.vocab_size * spec.hidden + _layers(spec, 0, spec.layers, 1, 1).all + spec.hidden


def active_parameters(spec: ModelSpec) -> int:
    """Parameters of the matrices that one token is multiplied with: the head included, the embedding not."""
    return spec.vocab_size * spec.hidden + sum(_active_layer(spec, layer) for layer in range(spec.layers))


def on_rank(spec: ModelSpec, layout: ParallelSizes, stage: int, head: bool = True) -> Count:
    """Parameters that a rank of a stage holds, the vocabulary's padding included.

    head: whether the last stage has the output matrix (the teacher's has not: megatron/teacher.py).
    """
    per_stage = spec.layers // layout.pipeline
    layers = _layers(spec, stage * per_stage, per_stage, layout.tensor, layout.expert)
    dense, experts = layers.dense, layers.experts
    rows = spec.padded_vocab(layout.tensor) // layout.tensor * spec.hidden
    first, last = stage == 0, stage == layout.pipeline - 1
    dense += rows * first + spec.hidden * last  # embedding, final norm
    dense += rows * (last and head and not (spec.tied and first))
    return Count(dense, experts)


def largest_rank(spec: ModelSpec, layout: ParallelSizes, head: bool = True) -> Count:
    """Parameters on a rank of the fullest stage, which is the first or the last one."""
    return max((on_rank(spec, layout, stage, head) for stage in {0, layout.pipeline - 1}), key=lambda count: count.all)


def flops_by_length(spec: ModelSpec, head: bool = True) -> Callable[[float], float]:
    """FLOPs of one sequence's forward pass as a function of its length; what depends on the model is counted once.

    2 for each parameter and token, and causal attention's two products.
    """
    active = active_parameters(spec) - (0 if head else spec.vocab_size * spec.hidden)
    attention = 2 * spec.layers * spec.heads * spec.head_dim
    return lambda length: 2 * active * length + attention * length**2


def cache_bytes(spec: ModelSpec, bytes_each: int, tensor: int = 1) -> int:
    """Bytes of one token in the KV cache of one of `tensor` ranks. With more ranks than heads, heads are repeated."""
    heads = -(-spec.kv_heads // tensor)
    return 2 * spec.layers * heads * spec.head_dim * bytes_each


def touched_parameters(spec: ModelSpec, batch: float) -> float:
    """Parameters that a decoding step of `batch` tokens reads; only the experts that one of the tokens goes to."""
    total = active_parameters(spec)
    if spec.moe is None:
        return total
    one = 3 * spec.hidden * spec.moe.ffn * sum(spec.moe.sparse)
    touched = spec.moe.experts * (1 - (1 - spec.moe.per_token / spec.moe.experts) ** batch)
    return total + one * (touched - spec.moe.per_token)


def _attention(spec: ModelSpec, tensor: int) -> int:
    width, groups = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    matrices = 2 * spec.hidden * width + 2 * spec.hidden * groups
    return (matrices + (width + 2 * groups) * spec.qkv_bias) // tensor + 2 * spec.head_dim * spec.qk_norm


def _layers(spec: ModelSpec, begin: int, count: int, tensor: int, expert: int) -> Count:
    """Parameters of `count` layers on one rank. A search asks for many layouts, so layers of a kind are counted once.

    megatron-core keeps norms and the router whole on every TP rank, and this project keeps each expert whole.
    """
    moe = spec.moe
    sparse = sum(moe.sparse[begin : begin + count]) if moe else 0
    dense = count * (_attention(spec, tensor) + 2 * spec.hidden)
    dense += (count - sparse) * (3 * spec.hidden * spec.ffn // tensor)
    if moe is None:
        return Count(dense)
    one = 3 * spec.hidden * moe.ffn * moe.experts // expert
    return Count(dense + sparse * spec.hidden * moe.experts, sparse * one)


def _active_layer(spec: ModelSpec, layer: int) -> int:
    width = spec.ffn
    if spec.is_sparse(layer) and spec.moe is not None:
        width = spec.moe.ffn * spec.moe.per_token
    return _attention(spec, 1) + 3 * spec.hidden * width
