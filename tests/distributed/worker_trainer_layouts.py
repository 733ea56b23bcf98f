"""Ranks of test_trainer_layouts.py: one gated-distillation step, by micro-batch budget, and the learning rates.

    torchrun … worker_trainer_layouts.py MODELS OUT TP

Writes OUT/rank<r>.json, {budget: record}, and OUT/<budget>.rank<r>.safetensors, the parameters after the step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file

from prune_opd import platform
from prune_opd.config import OptimizerConfig, ParallelConfig
from tests.distributed.tiny_run import build_run, made_up_rollouts, train_config, train_step, whole_parameters

# Tokens of a micro-batch: all rows in one; several; every row alone, and of two ranks' eight micro-batches one empty.
BUDGETS = (16384, 40, 1)
STEPS, WARMUP, LR, MIN_LR = 6, 2, 1e-3, 1e-4


def learning_rates(models: Path, layout: Any, schedule: str, warmup: int) -> dict[str, Any]:
    """lr of each update, and how far the first one moved the parameter that it moved furthest."""
    optimizer = OptimizerConfig(lr=LR, min_lr=MIN_LR, schedule=schedule, warmup_steps=warmup, weight_decay=0, eps=1e-12)
    run = build_run(train_config(models, layout.student.tp, optimizer=optimizer, steps=STEPS), layout, models)
    before = whole_parameters(run.trainer.chunks)
    rates, moved = [], []
    for _ in range(STEPS):
        rates.append(train_step(run, made_up_rollouts())["lr"])
        after = whole_parameters(run.trainer.chunks)
        moved.append(max((after[name] - before[name]).abs().max().item() for name in after))
        before = after
    return {"lr": rates, "first_move": moved[0]}


def main(models: Path, out: Path, tensor_parallel: int) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts

    layout = layouts.initialize(ParallelConfig(tensor=tensor_parallel), machine, seed=0)
    records: dict[str, Any] = {}
    for budget in BUDGETS:
        parallel = ParallelConfig(tensor=tensor_parallel, microbatch_tokens=budget)
        run = build_run(train_config(models, tensor_parallel, parallel=parallel), layout, out)
        records[str(budget)] = train_step(run, made_up_rollouts())
        save_file(whole_parameters(run.trainer.chunks), out / f"{budget}.rank{layout.rank}.safetensors")
    if layout.world == 1:
        records["schedules"] = {
            f"{schedule} {warmup}": learning_rates(models, layout, schedule, warmup)
            for schedule in ("constant", "linear", "cosine")
            for warmup in (0, WARMUP)
        }
    (out / f"rank{layout.rank}.json").write_text(json.dumps(records))
    dist.barrier()
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
