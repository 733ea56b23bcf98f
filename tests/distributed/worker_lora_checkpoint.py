"""Ranks of test_lora_checkpoint.py: what a checkpoint of adapters holds, and who can go on from it.

    torchrun … worker_lora_checkpoint.py MODELS OUT LAYOUT [OTHER_CHECKPOINT]

Trains two steps, saves, goes on for two more, then does those again from the checkpoint. Given a checkpoint of another
layout, loads it and trains one step, as it does from its own. On one rank also: a checkpoint of the whole student, a
student that has changed, and an export. Rank 0 writes OUT/results.json and OUT/*.safetensors.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from prune_opd import platform
from prune_opd.config import LoraConfig, OptimizerConfig, ParallelConfig
from prune_opd.errors import UserError
from tests.distributed.tiny_run import build_run, train_config
from tests.distributed.worker_checkpoint import made_up_step
from tests.distributed.worker_lora import LORA, shake, whole_adapters

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2+SP": {"tensor": 2, "sequence_parallel": True},
    "one": {"tensor": 1},
    "PP2": {"tensor": 1, "pipeline": 2},
    "DP2+dist-opt": {"tensor": 1, "distributed_optimizer": True},
    "TP2+dist-opt": {"tensor": 2, "distributed_optimizer": True},
}
BEFORE, AFTER = 2, 2
COPY = "copied_checkpoint"


def fresh_run(models: Path, out: Path, layout: Any, parallel: ParallelConfig, lora: LoraConfig = LORA) -> Any:
    optimizer = OptimizerConfig(lr=1e-3, min_lr=1e-5, schedule="linear", warmup_steps=3)
    config = train_config(models, 1, optimizer=optimizer, steps=10, parallel=parallel, lora=lora)
    run = build_run(config, layout, out)
    torch.manual_seed(1234 + layout.rank)
    return run


def moments(run: Any) -> list[Tensor]:
    """Adam's, of this rank, in the order of its parameters."""
    parts = getattr(run.trainer.optimizer, "chained_optimizers", [run.trainer.optimizer])
    states = [
        part.optimizer.state[p] for part in parts for group in part.optimizer.param_groups for p in group["params"]
    ]
    return [state[name].clone() for state in states for name in ("exp_avg", "exp_avg_sq")]


def saved_bytes(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.glob("*.distcp"))


def train_and_resume(run: Any, again: Any, out: Path, any_layout: bool) -> dict[str, Any]:
    """Whether a run that is resumed goes on as it would have, to the last bit; and its checkpoint, as OUT/COPY."""
    shake(run.trainer.chunks)
    run.trainer.optimizer.reload_model_params()
    torch.manual_seed(7)
    for _ in range(BEFORE):
        made_up_step(run)
    run.save_checkpoint(last=any_layout)
    run.checkpoints.finish()
    saved, there, then = run.checkpoints.latest(), whole_adapters(run.trainer.chunks), moments(run)
    unbroken = [made_up_step(run) for _ in range(AFTER)]
    again.load_checkpoint(saved)
    loaded, now = whole_adapters(again.trainer.chunks), moments(again)
    resumed = [made_up_step(again) for _ in range(AFTER)]
    ends = [whole_adapters(one.trainer.chunks) for one in (run, again)]
    if run.layout.is_main:
        shutil.copytree(saved, out / COPY, dirs_exist_ok=True)
        save_file(there, out / "saved.safetensors")
    return {
        "loaded": all(torch.equal(there[name], loaded[name]) for name in there),
        "moments": len(then) == len(now) > 0 and all(map(torch.equal, then, now)),
        "steps": [unbroken, resumed],
        "ends": all(torch.equal(ends[0][name], ends[1][name]) for name in there),
        "moved": all(not torch.equal(ends[0][name], there[name]) for name in there),
        "bytes": saved_bytes(saved),
    }


def of_the_whole_student(models: Path, out: Path, layout: Any, parallel: ParallelConfig) -> int:
    """Bytes of a checkpoint of the same student without adapters."""
    run = fresh_run(models, out / "whole", layout, parallel, LoraConfig())
    made_up_step(run)
    run.save_checkpoint()
    run.checkpoints.finish()
    return saved_bytes(run.checkpoints.latest())


def of_another_student(models: Path, out: Path, layout: Any, parallel: ParallelConfig) -> str:
    """What is said when the student's directory has other weights than when the adapters were trained."""
    other = out / "other"
    shutil.copytree(models, other)
    weights = load_file(other / "student" / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "student" / "model.safetensors", metadata={"format": "pt"})
    try:
        fresh_run(other, out / "others", layout, parallel).load_checkpoint(out / COPY)
    except UserError as error:
        return str(error)
    return "nothing"


def main(models: Path, out: Path, name: str, other: Path | None) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.export import export_checkpoint
    from prune_opd.weights.stream import export_hf

    parallel = ParallelConfig(**LAYOUTS[name])
    layout = layouts.initialize(parallel, machine, seed=0)
    results: dict[str, Any] = {}
    kinds = (False, True) if parallel.distributed_optimizer else (True,)
    for any_layout in kinds:  # the last one is what other layouts load
        pair = [fresh_run(models, out / str(any_layout), layout, parallel) for _ in range(2)]
        pair[0].config = pair[0].config if any_layout else with_last_only(pair[0].config)
        results[f"any layout: {any_layout}"] = train_and_resume(*pair, out, any_layout)
    for kind, checkpoint in {"probe": out / COPY, "moved": other}.items():
        if checkpoint:
            dist.barrier()
            moved = fresh_run(models, out, layout, parallel)
            moved.load_checkpoint(checkpoint)
            there = whole_adapters(moved.trainer.chunks)
            if kind == "probe":
                export_hf(moved.trainer.chunks, moved.config.student, out / "hf", write=layout.is_main)
            elif layout.is_main:
                save_file(there, out / "moved.safetensors")
            torch.manual_seed(99)
            results[kind] = made_up_step(moved)
    if layout.world == 1:
        results["whole bytes"] = of_the_whole_student(models, out, layout, parallel)
        results["another student"] = of_another_student(models, out, layout, parallel)
    if layout.is_main:
        (out / "results.json").write_text(json.dumps(results))
    alone = layout.world == 1
    layouts.shutdown()
    if alone:
        export_checkpoint(out / COPY, out / "exported")


def with_last_only(config: Any) -> Any:
    from dataclasses import replace

    return replace(config, checkpoint=replace(config.checkpoint, any_layout="last"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]) if sys.argv[4:] else None)
