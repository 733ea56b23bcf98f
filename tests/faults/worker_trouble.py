"""Ranks of test_trouble.py: two data-parallel ranks without an engine; numbers that are not finite, disks that refuse.

    torchrun … worker_trouble.py MODELS OUT DISK

DISK is a small file system; rank 0 writes OUT/results.json.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prune_opd import platform
from prune_opd.config import CheckpointConfig, ParallelConfig, SurvivalConfig
from prune_opd.errors import UserError
from tests.distributed.tiny_run import build_run, made_up_rollouts, train_config, train_step, whole_parameters

ROOM = 200_000  # bytes that are left on a disk that is full


class Notes:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def spoil(run: Any, what: str, rank: int) -> Any:
    """Give one rank a loss or logits that are NaN, or an infinite gradient. Returns the right loss function."""
    from prune_opd import loop

    right = loop.gated_loss

    def gated_loss(*args: Any, **kwargs: Any) -> Any:
        loss = right(*args, **kwargs)

        def spoilt(model: Any, batch: Any, hidden_NH: torch.Tensor) -> Any:
            if run.layout.rank != rank:
                return loss(model, batch, hidden_NH)
            if what == "gradient":
                hidden_NH.register_hook(lambda gradient: gradient * math.inf)
                return loss(model, batch, hidden_NH)
            if what == "logits":
                return loss(model, batch, hidden_NH * math.nan)
            loss_sum, tokens = loss(model, batch, hidden_NH)
            return loss_sum + math.nan, tokens

        return spoilt

    loop.gated_loss = gated_loss
    return right


def not_finite(run: Any) -> dict[str, Any]:
    from prune_opd import loop

    run.tracker = Notes()
    found: dict[str, Any] = {"first": train_step(run, made_up_rollouts(1))["updates"]}
    for what, rank in (("loss", 1), ("gradient", 0), ("logits", 1)):
        right = spoil(run, what, rank)
        before, window = whole_parameters(run.trainer.chunks), run.controller.horizon
        step = train_step(run, made_up_rollouts(2))
        after = whole_parameters(run.trainer.chunks)
        same = all(torch.equal(before[name], after[name]) for name in before)
        judged = int(sum(not math.isnan(length) for length in step["reliable_length_B"]))
        found["judged, " + what] = [judged, len(step["reliable_length_B"])]
        found[what] = {"updates": step["updates"], "same": same, "window": run.controller.horizon == window}
        loop.gated_loss = right
    found["in a row"] = run.skipped_in_a_row
    moved = whole_parameters(run.trainer.chunks)
    found["after"] = train_step(run, made_up_rollouts(3))["updates"]
    found["moved"] = any(not torch.equal(moved[n], t) for n, t in whole_parameters(run.trainer.chunks).items())
    found["finite"] = all(bool(t.isfinite().all()) for t in whole_parameters(run.trainer.chunks).values())
    found["reset"] = run.skipped_in_a_row
    right = spoil(run, "logits", 1)
    for _ in range(3):
        train_step(run, made_up_rollouts(4))
    try:
        train_step(run, made_up_rollouts(5))
    except UserError as error:
        found["stopped"] = str(error)
    loop.gated_loss = right
    found["notes"] = run.tracker.lines
    return found


def full_disk(run: Any, disk: Path) -> dict[str, Any]:
    checkpoints, main = run.checkpoints, run.layout.is_main
    run.finished_steps = 1
    run.save_checkpoint()
    checkpoints.finish()
    if main:
        (disk / "junk").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - ROOM)))
    dist.barrier()
    said = [None] * run.layout.world
    run.finished_steps = 2
    try:
        run.save_checkpoint()
        checkpoints.finish()
    except UserError as error:
        dist.all_gather_object(said, str(error))
    names = sorted(path.name for path in checkpoints.directory.iterdir())
    good = str(checkpoints.newest_good()[0])
    dist.barrier()
    if main:
        (disk / "junk").unlink()
    dist.barrier()
    for step in (2, 3, 4, 5):
        run.finished_steps = step
        run.save_checkpoint()
    checkpoints.finish()
    return {"said": said, "names": names, "good": Path(good).name, "later": checkpoints.latest().name} | {
        "kept": sorted(path.name for path in checkpoints.directory.iterdir())
    }


def main(models: Path, out: Path, disk: Path) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts

    layout = layouts.initialize(ParallelConfig(tensor=1), machine, seed=0)
    checkpoint = CheckpointConfig(keep=2, keep_every=2)
    config = train_config(models, 1, survival=SurvivalConfig(max_skipped=4), checkpoint=checkpoint)
    run = build_run(config, layout, disk)
    results = {"not finite": not_finite(run), "full disk": full_disk(run, disk)}
    if layout.is_main:
        (out / "results.json").write_text(json.dumps(results))
    layouts.shutdown()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
