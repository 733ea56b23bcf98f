"""Low-rank adapters on megatron-core's parallel linear layers (LoRA, arXiv 2106.09685), and their checkpoints.

    y = W x + alpha / rank · B (A x)          W frozen, B = 0 at first

                              A [rank, in]        B [out, rank]       between the two
    cut by rows (qkv, fc1)    whole on each rank  cut as W            A x: gathered over the tokens (sequence parallel)
    cut by columns (proj, fc2) cut as W           whole on each rank  A x: summed over the TP ranks

What ranks exchange for an adapter has `rank` columns. Where each TP rank has a part of the tokens (sequence
parallelism), the whole one of the two gets a part of its gradient on each; megatron-core adds those up, as for norms.

megatron-core 0.16.1 has no adapters, and of the libraries that have them none can be imported beside it without
Transformer Engine (docs/lora.md says what was tried).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from prune_opd.config import LoraConfig
from prune_opd.errors import UserError
from prune_opd.megatron.model import HiddenStatesGPT

BY_COLUMNS = ("linear_proj", "linear_fc2")  # megatron-core's row-parallel layers: their input is cut over the TP ranks


class Adapter(torch.nn.Module):
    """The adapter of one linear layer on this rank: a [rank, in] and b [out, rank], one of them cut over the TP ranks.

    first: the whole a, the same on every rank of every layout.
    """

    def __init__(self, linear: Any, first: Tensor, by_columns: bool, lora: LoraConfig, group: Any) -> None:
        super().__init__()
        self.by_columns, self.scale, self.group = by_columns, lora.scale, group
        self.sequence_parallel = bool(linear.config.sequence_parallel)
        rows, columns = linear.weight.shape
        if by_columns:
            first = first.narrow(1, group.rank() * columns, columns)
        self.a = torch.nn.Parameter(first.to(linear.weight.device, linear.weight.dtype))
        self.b = torch.nn.Parameter(linear.weight.new_zeros(rows, lora.rank))
        cut, whole = (self.a, self.b) if by_columns else (self.b, self.a)
        set_tensor_model_parallel_attributes(cut, is_parallel=True, dim=1 if by_columns else 0, stride=1)
        marked: Any = whole
        marked.sequence_parallel = self.sequence_parallel

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y [N, 1, out], what the layer has made of x [N, 1, in], with what the adapter makes of it."""
        low = self._together(F.linear(x, self.a))
        return torch.addmm(y.flatten(0, 1), low.flatten(0, 1), self.b.t(), alpha=self.scale).view_as(y)

    def _together(self, low: Tensor) -> Tensor:
        """A x of the tokens that the layer's output has, whole, and its gradient whole too."""
        if self.group.size() == 1:
            return low
        if self.by_columns:
            reduce = reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else _add_up
            return reduce(low, group=self.group)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(low, group=self.group)
        return copy_to_tensor_model_parallel_region(low, group=self.group)


def _add_up(low: Tensor, group: Any) -> Tensor:
    return reduce_from_tensor_model_parallel_region(low, group=group)


def attach(chunks: Sequence[HiddenStatesGPT], lora: LoraConfig, seed: int) -> None:
    """Freeze the model and give each of the layers that `lora` names an adapter, in the dtype of its weight.

    A is uniform in ±1/√in, as `peft` has it, by the seed and the layer's place in the whole model; B is 0.
    """
    for chunk in chunks:
        chunk.requires_grad_(False)
        chunk.lora = lora
        tp = chunk.pg_collection.tp
        for name, linear in _targets(chunk, lora):
            by_columns = name.endswith(BY_COLUMNS)
            columns = linear.weight.shape[1] * (tp.size() if by_columns else 1)
            first = _first(seed, name, lora.rank, columns)
            linear.adapter = Adapter(linear, first, by_columns, lora, tp)
            linear.register_forward_hook(_add_adapter)
        if chunk.pre_process and chunk.config.recompute_granularity == "full":
            chunk.embedding.register_forward_hook(_ask_for_gradient)


def _targets(chunk: HiddenStatesGPT, lora: LoraConfig) -> Iterator[tuple[str, Any]]:
    """The layers that get an adapter, by their names in the whole model."""
    for layer in chunk.decoder.layers:
        name = f"decoder.layers.{layer.layer_number - 1}"
        for part, modules in (("self_attention", layer.self_attention), ("mlp", layer.mlp)):
            for target in lora.targets:
                if (linear := getattr(modules, target, None)) is not None:
                    yield f"{name}.{part}.{target}", linear


def _first(seed: int, name: str, rank: int, columns: int) -> Tensor:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(rank, columns, generator=generator).mul_(2).sub_(1).mul_(columns**-0.5)


def _add_adapter(linear: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]) -> Any:
    return linear.adapter(inputs[0], output[0]), output[1]


def _ask_for_gradient(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
    """A layer that is recomputed has gradients only if its input has one, and a frozen embedding's output has none."""
    if torch.is_grad_enabled():
        output.requires_grad_()


def adapters(chunk: HiddenStatesGPT) -> Iterator[tuple[str, str, Adapter]]:
    """(name in this chunk, name in the whole model, adapter)"""
    for i, layer in enumerate(chunk.decoder.layers):
        for name, module in layer.named_modules():
            if isinstance(module, Adapter):
                yield f"decoder.layers.{i}.{name}", f"decoder.layers.{layer.layer_number - 1}.{name}", module


def sharded_adapters(chunk: HiddenStatesGPT, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """A chunk's sharded state dict for a checkpoint that has its adapters and nothing else."""
    groups = chunk.pg_collection
    found: dict[str, Any] = {}
    replicas = (metadata or {}).get("dp_cp_group", groups.dp_cp)
    for local, whole, adapter in adapters(chunk):
        cut = {"a": 1} if adapter.by_columns else {"b": 0}
        parts = {"a": adapter.a, "b": adapter.b}
        shards = make_sharded_tensors_for_checkpoint(parts, f"{whole}.", cut, tp_group=groups.tp, dp_cp_group=replicas)
        if "linear_fc1" in whole:  # gate and up of a rank lie together, so other TP ranks hold other rows
            shards[f"{whole}.b"] = apply_swiglu_sharded_factory(shards[f"{whole}.b"], ())
        found |= {f"{local}.{part}": shards[f"{whole}.{part}"] for part in parts}
    return found


def load_adapters(chunk: HiddenStatesGPT, state: dict[str, Tensor]) -> None:
    """Give a chunk's adapters what `load_shards` has found for them."""
    wanted = {f"{local}.{part}" for local, _, _ in adapters(chunk) for part in "ab"}
    missing, unexpected = chunk.load_state_dict(state, strict=False)
    lost = [*wanted.intersection(missing), *unexpected]
    if lost:
        raise UserError(f"the checkpoint does not fit the adapters: {', '.join(sorted(lost)[:3])}; was it of others?")
