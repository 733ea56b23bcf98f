"""Ranks of test_checkpoint_layouts.py: a checkpoint goes from layout to layout, and training goes on from each.

    torchrun … worker_checkpoint_layouts.py MODELS OUT

On two ranks: two steps in one layout, a checkpoint, two more steps (the unbroken run, exported to OUT/<optimizer>/hf).
Every other layout loads that checkpoint, saves its own at once, and does the two steps too. On one rank: the same from
the last layout's checkpoint, and `export` of it. Writes OUT/<ranks>.json from rank 0, {case: results}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from prune_opd import platform
from prune_opd.config import ParallelConfig
from tests.distributed.tiny_run import build_run, train_config
from tests.distributed.worker_layout_matrix import BUDGET, farthest_from_reference, step

BEFORE, AFTER = 2, 2
OPTIMIZERS = {"adam": False, "distributed": True}
FIRST = {"tensor": 2}
OTHERS: dict[str, dict[str, Any]] = {
    "TP2 again": {"tensor": 2},
    "DP2": {"tensor": 1},
    "PP2xVPP2": {"tensor": 1, "pipeline": 2, "virtual_pipeline": 2},
    "PP2": {"tensor": 1, "pipeline": 2},  # the last: one rank goes on from its checkpoint
}


def make_run(models: Path, folder: Path, parallel: ParallelConfig) -> Any:
    from prune_opd.megatron import layout as layouts

    return build_run(train_config(models, 1, parallel=parallel), layouts.arrange(parallel, seed=0), folder)


def go_on(run: Any, reference: Path) -> dict[str, Any]:
    first = run.finished_steps
    steps = [step(run, first + i) for i in range(1, AFTER + 1)]
    result = {"first": first, "steps": steps, "horizon": run.controller.horizon}
    if reference.exists():
        farthest = torch.tensor(farthest_from_reference(run, reference))
        torch.distributed.all_reduce(farthest, op=torch.distributed.ReduceOp.MAX)
        result["parameters"] = farthest.item()
    return result


def travel(models: Path, out: Path, distributed: bool) -> dict[str, Any]:
    from prune_opd.weights.stream import export_hf

    def parallel(settings: dict[str, Any]) -> ParallelConfig:
        return ParallelConfig(microbatch_tokens=BUDGET, distributed_optimizer=distributed, **settings)

    run = make_run(models, out / "first", parallel(FIRST))
    for number in range(1, BEFORE + 1):
        step(run, number)
    run.save_checkpoint()
    run.checkpoints.finish()
    results = {"unbroken": go_on(run, out / "hf")}
    export_hf(run.trainer.chunks, models / "student", out / "hf", write=run.layout.is_main)
    torch.distributed.barrier()
    for name, settings in OTHERS.items():
        other = make_run(models, out / name, parallel(settings))
        other.load_checkpoint(run.checkpoints.latest())
        other.save_checkpoint()
        other.checkpoints.finish()
        results[name] = go_on(other, out / "hf")
    return results


def arrive(models: Path, out: Path, distributed: bool) -> dict[str, Any]:
    """One process goes on from the checkpoint that a pipeline saved."""
    run = make_run(models, out / "alone", ParallelConfig(tensor=1, distributed_optimizer=distributed))
    run.load_checkpoint(out / "PP2" / "checkpoints" / f"step_{BEFORE:06d}")
    return {"alone": go_on(run, out / "hf")}


def main(models: Path, out: Path) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.export import export_checkpoint

    world = int(os.environ["WORLD_SIZE"])
    if world == 1:
        for name in OPTIMIZERS:
            last = out / name / "PP2" / "checkpoints" / f"step_{BEFORE:06d}"
            export_checkpoint(last, out / name / "exported")
    layouts.initialize(ParallelConfig(tensor=1), machine, seed=0)
    journey = arrive if world == 1 else travel
    results = {name: journey(models, out / name, distributed) for name, distributed in OPTIMIZERS.items()}
    if torch.distributed.get_rank() == 0:
        (out / f"{world}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
