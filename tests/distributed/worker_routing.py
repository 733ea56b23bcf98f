"""Ranks of test_routing.py: a step of a student with experts, with its routing forgotten after each layer and kept.

    torchrun … worker_routing.py MODELS OUT

Rank r writes OUT/rank<r>.json: {dtype: findings}.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from prune_opd import platform
from prune_opd.config import ParallelConfig, PrecisionConfig
from tests.distributed.tiny_run import build_run, made_up_rollouts, train_config, train_step

PARALLEL = ParallelConfig(tensor=1, expert=2, teacher_expert=2, recompute="full", microbatch_tokens=64)
DTYPES = ("fp32", "bf16")


def step(
    models: Path, out: Path, dtype: str, layout: Any, kept: bool
) -> tuple[dict[str, Any], list[torch.Tensor], int]:
    """The step, the gradients on this rank, and the bytes that the dispatchers have afterwards."""
    from prune_opd.megatron import model

    config = train_config(models, 1, parallel=PARALLEL, precision=PrecisionConfig(params=dtype))
    as_it_was = mock.patch.object(model, "release_routing", lambda layer: None) if kept else nullcontext()
    with as_it_was:
        run = build_run(config, layout, out)
    found = train_step(run, made_up_rollouts(1))
    trainer = run.trainer
    buffers = [b for chunk in trainer.ddp for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return found, [b.grad_data.clone() for b in buffers], sum(routed_bytes(chunk) for chunk in trainer.chunks)


def routed_bytes(chunk: Any) -> int:
    """Of the attributes of dispatchers that come with tokens."""
    tensors = [
        value
        for module in chunk.modules()
        for value in vars(getattr(module, "token_dispatcher", None) or torch.nn.Module()).values()
        if isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.bfloat16, torch.bool)
    ]
    return sum(tensor.nbytes for tensor in tensors)


def main(models: Path, out: Path) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts

    rank = layouts.initialize(ParallelConfig(tensor=1), machine, seed=0).rank
    results = {}
    for dtype in DTYPES:
        layout = layouts.arrange(PARALLEL, seed=0)
        (was, before, held), (now, after, left) = (step(models, out, dtype, layout, kept) for kept in (True, False))
        results[dtype] = {
            "gradients": len(after),
            "largest": max(float(gradient.abs().max()) for gradient in after),
            "same gradients": len(before) == len(after) and all(map(torch.equal, before, after)),
            "same step": was == now,
            "held": held,
            "left": left,
        }
    (out / f"rank{rank}.json").write_text(json.dumps(results))
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
