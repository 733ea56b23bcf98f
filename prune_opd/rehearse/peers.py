"""What the other ranks would have said, where the product asks them for more than numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch.distributed as dist

from prune_opd.config import LoraConfig, ParallelConfig, TrainConfig
from prune_opd.model_spec import ModelSpec
from prune_opd.rehearse.watch import Watch
from prune_opd.weights.adapters import adapter_entries
from prune_opd.weights.buckets import Holding
from prune_opd.weights.mapping import LAYERS, Entry, entries


@contextmanager
def answering(watch: Watch, spec: ModelSpec, config: TrainConfig, world: int) -> Iterator[None]:
    """The ranks of a student's replica say which shards they have; no rank's evidence stops a response in flight.

    spec: of the student.
    """
    from prune_opd.inflight.gate import InflightGate
    from prune_opd.megatron import self_test
    from prune_opd.weights import stream

    def gather(everyone: list[Any], mine: dict[str, Holding], group: Any) -> None:
        dist.all_gather_object(everyone, mine, group=group)  # for the books
        dtype, merged = next(iter(mine.values())).dtype, with_adapters(spec, config.lora)
        for place, rank in enumerate(dist.get_process_group_ranks(group)):
            theirs = holdings(spec, config.parallel, world, rank)
            everyone[place] = {name: Holding(*shard, dtype, name in merged) for name, shard in theirs.items()}
        if everyone[group.rank()] != mine:
            raise AssertionError("the rehearsal is wrong about which shards a rank has")

    def decide(gate: Any, prefixes: Any, evidence: Any) -> set[int]:
        watch.traffic.note(watch.phase, "gather of objects")
        watch.traffic.note(watch.phase, "broadcast of objects")
        return set()

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(stream, "dist", SimpleNamespace(all_gather_object=gather)))
        stack.enter_context(mock.patch.object(InflightGate, "_decide", decide))
        stack.enter_context(mock.patch.object(self_test, "median", lambda logq: 0.0))  # not all ranks have a text
        yield


def with_adapters(spec: ModelSpec, lora: LoraConfig) -> set[str]:
    """The weights that have an adapter, by megatron name."""
    linears = (entry.megatron.rpartition(".adapter.")[0] for entry in adapter_entries(spec, lora))
    return {f"{linear}.weight" for linear in linears} if lora.on else set()


def holdings(spec: ModelSpec, parallel: ParallelConfig, world: int, rank: int) -> dict[str, tuple[int, int]]:
    """(index, count) of the shard that a rank of the student has, by megatron name."""
    tensor, stage = parallel.tensor_size(world), rank // (world // parallel.pipeline)
    return {
        entry.megatron: ((rank % tensor, tensor) if entry.cut.divided and entry.expert is None else (0, 1))
        for entry in entries(spec)
        if stage in _stages(entry, spec, parallel) and _has_expert(entry, spec, parallel, rank)
    }


def _stages(entry: Entry, spec: ModelSpec, parallel: ParallelConfig) -> set[int]:
    last = parallel.pipeline - 1
    if entry.megatron.startswith(LAYERS):
        layer = int(entry.megatron.removeprefix(LAYERS).partition(".")[0])
        chunk = layer // (spec.layers // (parallel.pipeline * parallel.virtual_pipeline))
        return {chunk % parallel.pipeline}
    if entry.megatron.startswith("embedding."):
        return {0, last} if spec.tied else {0}
    return {last}


def _has_expert(entry: Entry, spec: ModelSpec, parallel: ParallelConfig, rank: int) -> bool:
    if entry.expert is None or spec.moe is None:
        return True
    return entry.expert // (spec.moe.experts // parallel.expert) == rank % parallel.expert
