"""Ranks of test_not_finite.py: numbers that are not finite on one rank of a tensor- or pipeline-parallel model.

    torchrun … worker_not_finite.py MODELS OUT TENSOR PIPELINE

Rank 0 writes OUT/results.json: what each rank saw of each kind of trouble.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prune_opd import platform
from prune_opd.config import ParallelConfig, SurvivalConfig
from prune_opd.errors import UserError
from tests.distributed.tiny_run import build_run, made_up_rollouts, train_config, train_step, whole_parameters
from tests.faults.worker_trouble import Notes, spoil


def trouble(run: Any, what: str, rank: int) -> dict[str, Any]:
    """One step with `what` spoilt on `rank`, then one without; the first must leave every weight as it was."""
    from prune_opd import loop

    right = spoil(run, what, rank)
    before = whole_parameters(run.trainer.chunks)
    skipped = train_step(run, made_up_rollouts(2))
    loop.gated_loss = right
    after = whole_parameters(run.trainer.chunks)
    made = train_step(run, made_up_rollouts(3))
    moved = whole_parameters(run.trainer.chunks)
    return {
        "updates": [skipped["updates"], made["updates"]],
        "same": all(torch.equal(before[name], after[name]) for name in before),
        "moved": any(not torch.equal(after[name], moved[name]) for name in after),
        "finite": all(bool(tensor.isfinite().all()) for tensor in moved.values()),
    }


def too_many(run: Any, rank: int) -> str:
    """Steps without end: the run's own limit must stop every rank."""
    spoil(run, "loss", rank)
    try:
        for _ in range(5):
            train_step(run, made_up_rollouts(4))
    except UserError as error:
        return str(error)
    return "was not stopped"


def main(models: Path, out: Path, tensor: int, pipeline: int) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts

    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    layout = layouts.initialize(parallel, machine, seed=0)
    config = train_config(models, tensor, parallel=parallel, survival=SurvivalConfig(max_skipped=2))
    run = build_run(config, layout, out)
    run.tracker = Notes()
    found: dict[str, Any] = {what: trouble(run, what, rank=1) for what in ("loss", "logits", "gradient")}
    found["stopped"] = too_many(run, rank=1)
    found["notes"] = run.tracker.lines
    of_all: list[Any] = [None] * layout.world
    dist.all_gather_object(of_all, found)
    if layout.is_main:
        (out / "results.json").write_text(json.dumps(of_all))
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
