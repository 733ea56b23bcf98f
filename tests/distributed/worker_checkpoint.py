"""Ranks of test_checkpoint.py.

    torchrun … worker_checkpoint.py MODELS OUT TP [OTHER_CHECKPOINT]

Trains two steps, saves, goes on for three more; then does those three again from the checkpoint. Given a checkpoint of
another layout, loads that and trains one step, as it does from its own. Rank 0 writes OUT/results.json and the state of
model and optimizer as OUT/*.safetensors.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from prune_opd import platform
from prune_opd.config import CheckpointConfig, OptimizerConfig, ParallelConfig
from prune_opd.errors import UserError
from prune_opd.rollout.batch import Response, Rollouts
from tests.distributed.tiny_run import build_run, made_up_rollouts, train_config, train_step
from tests.models import merged

BEFORE, AFTER, KEEP = 2, 3, 2
COPY = "copied_checkpoint"


def made_up_step(run: Any) -> dict[str, Any]:
    """A step that depends on everything a checkpoint holds: generators, sampler, controller, schedule, optimizer."""
    drawn = made_up_rollouts(int(torch.randint(1 << 30, ())))
    prompts = tuple(run.rollout.sampler.next(len(drawn.responses)))
    horizon = run.controller.horizon
    cut = tuple(Response(response.ids[:horizon], response.finished) for response in drawn.responses)
    return train_step(run, Rollouts(prompts, cut))


def whole_state(trainer: Any) -> dict[str, Tensor]:
    """Parameters and Adam's moments under Hugging Face names, whole, whatever the layout."""
    from prune_opd.weights.cut import WHOLE
    from prune_opd.weights.mapping import entries

    (model,), group = trainer.chunks, trainer.layout.student.tp_group
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    (adam,) = (part.optimizer for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]))
    kinds: dict[str, dict[str, Tensor]] = {"parameter": {}, "exp_avg": {}, "exp_avg_sq": {}}
    for parameter, state in adam.state.items():
        kinds["parameter"][name_of[id(parameter)]] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            kinds[moment][name_of[id(parameter)]] = state[moment]
    whole: dict[str, Tensor] = {}
    for kind, tensors in kinds.items():
        for entry in entries(model.spec):
            local = tensors[entry.megatron].contiguous()
            shards = [local]
            if group is not None and entry.cut != WHOLE:
                shards = [torch.empty_like(local) for _ in range(trainer.layout.student.tp)]
                dist.all_gather(shards, local, group=group)
            whole |= {f"{kind} {name}": tensor for name, tensor in merged(entry, shards).items()}
    steps = {float(state["step"]) for state in adam.state.values()}
    assert len(steps) == 1
    return {**whole, "step": torch.tensor(steps.pop())}


def fresh_run(models: Path, out: Path, layout: Any) -> Any:
    """Weights from the directory, and generators that stand somewhere else on every rank."""
    optimizer = OptimizerConfig(lr=1e-3, min_lr=1e-5, schedule="linear", warmup_steps=3)
    checkpoint = CheckpointConfig(keep=KEEP)
    run = build_run(
        train_config(models, layout.student.tp, optimizer=optimizer, steps=10, checkpoint=checkpoint), layout, out
    )
    torch.manual_seed(1234 + layout.rank)
    return run


def draws() -> list[float]:
    """The next number of every generator of this rank."""
    return [random.random(), float(np.random.rand()), torch.rand(()).item()]


def disk_full(path: Path) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def save(run: Any, step: int) -> None:
    run.checkpoints.save(step, run.trainer, {})
    run.checkpoints.finish()


def failed_saves(run: Any) -> dict[str, Any]:
    """Saves that break off: while the checkpoint is written, and when it is complete but `latest` has not moved."""
    from prune_opd.megatron import manifest

    checkpoints = run.checkpoints
    last = str(checkpoints.latest())
    steps = []
    record_durably, manifest.record_durably = manifest.record_durably, disk_full
    try:
        save(run, 90)
    except UserError as error:
        steps.append(str(error))
    manifest.record_durably = record_durably
    leftover = list(checkpoints.directory.glob("*.partial"))
    no_file = checkpoints.directory / "latest.partial"
    no_file.mkdir()
    try:
        save(run, 91)
    except UserError as error:
        steps.append(str(error))
    no_file.rmdir()
    complete = (checkpoints.directory / "step_000091" / "state.json").is_file()
    kept = str(checkpoints.latest()) == last
    save(run, 90)  # over the leftover, and with a later step in the folder
    latest = str(checkpoints.latest())
    return {
        "raised": steps,
        "leftover": len(leftover),
        "complete": complete,
        "latest stayed": kept,
        "latest": Path(latest).name,
        "latest is there": Path(latest).is_dir(),
        "names": sorted(path.name for path in checkpoints.directory.iterdir()),
    }


def main(models: Path, out: Path, tensor_parallel: int, other: Path | None) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts

    layout = layouts.initialize(ParallelConfig(tensor=tensor_parallel), machine, seed=0)
    results: dict[str, Any] = {}
    states: dict[str, dict[str, Tensor]] = {}
    run = fresh_run(models, out, layout)
    torch.manual_seed(7)
    results["latest of a fresh run"] = str(run.checkpoints.latest())
    for _ in range(BEFORE):
        made_up_step(run)
    run.full_response_length = 12.5
    junk = run.checkpoints.directory / f"step_{BEFORE:06d}.partial"
    if layout.is_main:
        (junk / "model").mkdir(parents=True)
        (junk / "state.json").write_text("left over from a kill")
    dist.barrier()
    run.save_checkpoint()
    states["saved"] = whole_state(run.trainer)
    results["while it is written"] = [str(run.checkpoints.latest()), run.checkpoints._saving is not None]
    results["unbroken"] = [draws(), made_up_step(run)]  # the child that writes must not see this step
    run.checkpoints.finish()
    saved = run.checkpoints.latest()
    results["saved"] = [saved.name, sorted(path.name for path in run.checkpoints.directory.iterdir())]
    if layout.is_main:
        shutil.copytree(saved, out / COPY)  # for another layout; `keep` drops the original below
    results["unbroken"] += [made_up_step(run) for _ in range(AFTER - 1)]
    states["unbroken"] = whole_state(run.trainer)

    resumed = fresh_run(models, out, layout)
    resumed.load_checkpoint(saved)
    results["loaded"] = [resumed.finished_steps, resumed.full_response_length]
    states["loaded"] = whole_state(resumed.trainer)
    results["resumed"] = [draws(), *(made_up_step(resumed) for _ in range(AFTER))]
    states["resumed"] = whole_state(resumed.trainer)

    for step in (4, 4, 6):  # 4 twice: a step that is trained again replaces its checkpoint
        resumed.finished_steps = step
        resumed.save_checkpoint()
    resumed.checkpoints.finish()
    results["kept"] = sorted(path.name for path in run.checkpoints.directory.iterdir())
    results["latest"] = str(run.checkpoints.latest().name)
    if layout.world == 1:
        results["failed"] = failed_saves(resumed)
    dist.barrier()
    for name, checkpoint in {"probe": out / COPY, "moved": other}.items():
        if checkpoint:
            moved = fresh_run(models, out, layout)
            moved.load_checkpoint(checkpoint)
            states[name] = whole_state(moved.trainer)
            torch.manual_seed(99)  # another number of ranks does not restore the generators
            results[name] = made_up_step(moved)
    if layout.is_main:
        for name, state in states.items():
            save_file(state, out / f"{name}.safetensors")
        (out / "results.json").write_text(json.dumps(results))
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]) if sys.argv[4:] else None)
