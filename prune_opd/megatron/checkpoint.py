"""Checkpoints: student and optimizer through megatron's distributed format, everything else as readable JSON.

A checkpoint is written under a temporary name and renamed when it is complete; the `latest` pointer moves last. So a
kill at any moment leaves the last good checkpoint in place.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

from prune_opd.errors import UserError
from prune_opd.megatron.layout import Layout
from prune_opd.megatron.trainer import Trainer

STATE_FILE = "state.json"
LATEST = "latest"


class Checkpoints:
    """The `checkpoints/` folder of a run. Every method but `latest` is collective."""

    def __init__(self, directory: Path, keep: int, layout: Layout):
        self.directory, self.keep, self.layout = directory, keep, layout

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None in a fresh run."""
        pointer = self.directory / LATEST
        return self.directory / pointer.read_text().strip() if pointer.exists() else None

    def save(self, step: int, trainer: Trainer, state: dict[str, Any]) -> Path:
        """Write `step_N`: the trainer's shards and `state` (JSON values), then drop checkpoints beyond `keep`."""
        final = self.directory / f"step_{step:06d}"
        partial = final.with_name(final.name + ".partial")
        if self.layout.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(trainer.sharded_state(loading=False), str(partial))
        if self.layout.is_main:
            _write_durably(partial / STATE_FILE, json.dumps({"step": step, **state}, indent=1))
            replaced = final.with_name(final.name + ".replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            if final.exists():  # a step that was trained again: `latest` may point to it, so it goes in one move
                final.rename(replaced)
            partial.rename(final)
            shutil.rmtree(replaced, ignore_errors=True)
            pointer = self.directory / (LATEST + ".partial")
            _write_durably(pointer, final.name)
            pointer.rename(self.directory / LATEST)
            # Steps beyond this one are of a continuation that was given up: never drop the new one in favour of them.
            others = sorted(path for path in self.directory.glob("step_??????") if path != final)
            for old in others[: max(0, len(others) - (self.keep - 1))]:
                shutil.rmtree(old)
        dist.barrier()
        return final

    def load(self, checkpoint: Path, trainer: Trainer) -> dict[str, Any]:
        """Restore the trainer in this run's layout and return the rest. Raises `UserError` for an incomplete one."""
        state = read_state(checkpoint)
        trainer.load(dist_checkpointing.load(trainer.sharded_state(loading=True), str(checkpoint)))
        return state


def read_state(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise UserError(
            f"{checkpoint} is not a checkpoint (no {STATE_FILE}): give a step_N folder of a run's checkpoints/"
        )
    return json.loads(path.read_text())


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
