"""Checkpoints: student and optimizer through megatron's distributed format, everything else as readable JSON.

A checkpoint is written under a temporary name and renamed when it is complete; the `latest` pointer moves last. So a
kill at any moment leaves the last good checkpoint in place.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from prune_opd.errors import UserError
from prune_opd.megatron.layout import Layout

if TYPE_CHECKING:
    from prune_opd.megatron.trainer import Trainer

STATE_FILE = "state.json"
EXTRA_STATE = "_extra_state"
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
        trainer.load(load_shards(trainer.sharded_state(loading=True), checkpoint))
        return state


def load_shards(wanted: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """`wanted`, a sharded state dict of any layout, filled from a checkpoint of any other. Collective.

    Transformer Engine's modules ask for an `_extra_state` (FP8 scales) that a checkpoint written without it does not
    have, and do without. Raises `UserError` if anything else is not there.
    """
    state, _, lacking = dist_checkpointing.load(wanted, str(checkpoint), strict=StrictHandling.RETURN_UNEXPECTED)
    lost = sorted(key for key in lacking if EXTRA_STATE not in key)
    if lost:
        raise UserError(
            f"{checkpoint} has no {', '.join(lost[:3])}{' …' if len(lost) > 3 else ''}: it is of another model or"
            " optimizer; resume with the settings it was written with"
        )
    return state


def load_model(model: torch.nn.Module, state: dict[str, Any]) -> None:
    """Give a model what `load_shards` has found for it. Raises `UserError` for a weight that was not."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    lost = [name for name in (*missing, *unexpected) if EXTRA_STATE not in name]
    if lost:
        raise UserError(f"the checkpoint does not fit the model: {', '.join(lost[:3])}; was it of another model?")


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
