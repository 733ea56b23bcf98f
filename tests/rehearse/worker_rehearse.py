"""Rehearsals of test_rehearse.py, one process for all: each is on tensors without data.

    worker_rehearse.py OUT CASE …

A case is a recipe, or a mistake (`MISTAKES`) that is made in a small one. OUT/CASE.json gets what was found.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from prune_opd.config import LoraConfig, TrainConfig
from prune_opd.config.recipe import load_recipe
from prune_opd.rehearse import machine

SMALL = "qwen3_8b_from_32b_32xh100_fp8"  # two TP ranks, sequence parallelism, in-flight looks, a teacher of its own TP
ONE_LAYER = 1
KEPT: list[Any] = []  # buckets


def a_host_tensor() -> AbstractContextManager[Any]:
    """The teacher's hidden states of a micro-batch are left on the host."""
    from prune_opd.megatron.redistribute import TeacherHidden

    packed = TeacherHidden.packed

    def on_the_host(self: Any, rows: Any) -> torch.Tensor:
        there = packed(self, rows)
        return torch.empty(there.shape, dtype=there.dtype)

    return mock.patch.object(TeacherHidden, "packed", on_the_host)


def a_kept_bucket() -> AbstractContextManager[Any]:
    """Somebody holds on to the buckets of the weights."""
    from prune_opd.weights.stream import Resharder

    make = Resharder._buffer

    def keep(self: Any, *args: Any) -> Any:
        KEPT.append(make(self, *args))
        return KEPT[-1]

    return mock.patch.object(Resharder, "_buffer", keep)


def a_skipped_collective() -> AbstractContextManager[Any]:
    """The norm of the weights is not added up."""
    from prune_opd.megatron.trainer import Trainer

    return mock.patch.object(Trainer, "weight_norm", lambda self: 1.0)


def a_lost_gradient() -> AbstractContextManager[Any]:
    """The output matrix has no gradient: the loss works on a copy of it."""
    from prune_opd.megatron.model import HiddenStatesGPT

    weight = HiddenStatesGPT.head_weight
    return mock.patch.object(HiddenStatesGPT, "head_weight", lambda self: weight(self).detach())


def an_unsent_tensor() -> AbstractContextManager[Any]:
    """A stage keeps its last gradient to itself."""
    from prune_opd.megatron.schedule import Messages

    communicate = Messages._communicate

    def keep(self: Any, *, tensor_send_prev: Any, **others: Any) -> Any:
        alone = not (others["recv_prev"] or others["recv_next"] or others["tensor_send_next"] is not None)
        return communicate(self, tensor_send_prev=None if alone else tensor_send_prev, **others)

    return mock.patch.object(Messages, "_communicate", keep)


def a_broken_ring() -> AbstractContextManager[Any]:
    """A context-parallel rank waits for keys and values once less than they are sent."""
    from prune_opd.rehearse import kernels

    pass_on, calls = kernels._pass_on, iter(range(10**6))
    return mock.patch.object(kernels, "_pass_on", lambda *args: pass_on(*args) if next(calls) else None)


# What is patched on the ranks that are rehearsed: 0, and 30, which shares the whole job with it.
MISTAKES: dict[str, tuple[Callable[[], AbstractContextManager[Any]], ...]] = {
    "none": (nullcontext, nullcontext),
    "host tensor": (a_host_tensor,),
    "kept bucket": (a_kept_bucket,),
    "skipped collective": (nullcontext, a_skipped_collective),
    "lost gradient": (a_lost_gradient,),
    "no mistake of a pipeline": (nullcontext, nullcontext),
    "unsent tensor": (nullcontext, an_unsent_tensor),
    "no mistake of a ring": (nullcontext, nullcontext),
    "broken ring": (nullcontext, a_broken_ring),
}
RANKS = (0, 30)
# Layouts that no recipe here has, by the mistakes that are made in them, and two ranks that send each other something.
PIPELINE = {"pipeline": 2, "teacher_pipeline": 2, "teacher_tensor": 4}
RING = {"context": 2}
IN_LAYOUT: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "no mistake of a pipeline": (PIPELINE, (0, 16)),
    "unsent tensor": (PIPELINE, (0, 16)),
    "no mistake of a ring": (RING, (0, 2)),
    "broken ring": (RING, (0, 2)),
}
# By case: settings of `parallel` in SMALL, and the rank that is rehearsed: of the first, a middle and the last stage.
CHUNKS = {"pipeline": 2, "virtual_pipeline": 3, "teacher_pipeline": 4, "teacher_tensor": 2}
STAGES = {"pipeline": 4, "teacher_pipeline": 2, "teacher_tensor": 4}
LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    "PP4 first": (STAGES, 0),
    "PP4 middle": (STAGES, 16),
    "PP4 last": (STAGES, 31),
    "PP2xVPP3 first": (CHUNKS, 0),
    "PP2xVPP3 last": (CHUNKS, 31),
    "CP2 first": (RING, 0),
    "CP2 last": ({**RING, "recompute": "none"}, 31),
    "CP4 middle": ({"context": 4, "recompute": "none"}, 16),
    "PP2xCP2 last": ({"context": 2, **PIPELINE}, 31),
    "LoRA PP2xCP2 last": ({"context": 2, **PIPELINE}, 31),
    "LoRA PP4 last": (STAGES, 31),
}
LAYERS = 12  # that all of these stages and chunks divide


def small(config: TrainConfig) -> TrainConfig:
    """As few tokens as show a mistake."""
    return replace(
        config,
        horizon=replace(config.horizon, max_len=1024, min_len=256, init_len=512),
        planning=replace(config.planning, response_length=700, mean_horizon=512),
        rollout=replace(
            config.rollout,
            max_prompt_len=128,
            prompts=8,
            inflight=replace(config.rollout.inflight, first_check=256),
        ),
        parallel=replace(config.parallel, microbatch_tokens=2048),
    )


def recipe(name: str) -> dict[str, Any]:
    """The last rank of a recipe's own world, with all tokens of a micro-batch, in fewer and larger chunks.

    Or one of LAYOUTS, with layers enough for its stages.
    """
    from prune_opd.rehearse.compare import compare
    from prune_opd.rehearse.report import problems, rank_lines
    from prune_opd.rehearse.step import Cut, rehearse_rank

    layout, rank = LAYOUTS.get(name, ({}, -1))
    config = load_recipe(SMALL if name in LAYOUTS else name)
    assert isinstance(config, TrainConfig)
    config = replace(config, parallel=replace(config.parallel, loss_chunk_tokens=8192, **layout))
    config = replace(config, lora=LoraConfig(rank=32 if "LoRA" in name else 0))
    nodes = config.planning.nodes
    cut = Cut(layers=LAYERS if name in LAYOUTS else ONE_LAYER, microbatches=1)
    found = rehearse_rank(config, nodes, rank % (nodes * config.parallel.nproc), cut)
    return {
        "problems": list(problems(found)),
        "lines": list(rank_lines(found)),
        "compared": {line.name: [line.counted, line.planned] for line in compare(found)},
        "reads": [[phase, how, str(place)] for phase, how, place in found.watch.found.reads],
        "phases": list(found.watch.ledger.peaks),
        "engine": engine_of(found),
        "loaded": [len(load) for load in found.run.rollout.engine.llm.loads],
    }


def engine_of(found: Any) -> dict[str, Any]:
    """What the recipe asks of vLLM on a GPU, and whether the ranks meet before."""
    arguments = found.run.rollout.engine.llm.arguments
    return {
        "autotune": arguments["enable_flashinfer_autotune"],
        "patience": [arguments[f"{kind}distributed_timeout_seconds"] for kind in ("", "cpu_")],
        "environment": [os.environ[f"VLLM_{name}"] for name in ("USE_FLASHINFER_SAMPLER", "ALLREDUCE_USE_FLASHINFER")],
        "head": arguments.get("hf_overrides"),
        "barriers": sum(
            total.count
            for (phase, _, operation), total in found.watch.traffic.by.items()
            if (phase, operation) == ("build", "barrier")
        ),
    }


def mistake(name: str) -> list[str]:
    from prune_opd.rehearse.report import problems
    from prune_opd.rehearse.step import Cut, rehearse_rank
    from prune_opd.rehearse.traffic import disagreements

    config = load_recipe(SMALL)
    assert isinstance(config, TrainConfig)
    layout, ranks = IN_LAYOUT.get(name, ({}, RANKS))
    config = small(replace(config, parallel=replace(config.parallel, **layout)))
    cut, seen = Cut(ONE_LAYER * config.parallel.pipeline, 1), []
    for rank, made in zip(ranks, MISTAKES[name], strict=False):
        with made():
            seen.append(rehearse_rank(config, config.planning.nodes, rank, cut))
    apart = list(disagreements([(one.rank, one.watch.traffic) for one in seen]))
    return [problem for one in seen for problem in problems(one)] + apart


def main(out: Path, cases: list[str]) -> None:
    machine.prepare()
    for case in cases:
        found = mistake(case) if case in MISTAKES else recipe(case)
        (out / f"{case}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
