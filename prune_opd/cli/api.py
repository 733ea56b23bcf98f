"""`prune_opd.train`: what a notebook or a script calls. The command does the same (`cli/runs.py`)."""

from __future__ import annotations

from pathlib import Path

from prune_opd.cli.runs import train_config
from prune_opd.config import RunConfig, TrainConfig
from prune_opd.errors import ConfigError


def train(
    config: RunConfig, run_dir: str | Path | None = None, *, nproc: int | None = None, resume: str = "auto"
) -> int:
    """Check a run, start its ranks on this node, and wait for their end.

    Args:
        config: what `prune_opd.load_recipe` returns, or a TrainConfig of your own.
        run_dir: default runs/NAME. A run that stopped there goes on.
        nproc: ranks on this node; default `parallel.nproc`.
        resume: auto, never, or the path of a checkpoint.

    Returns:
        The exit code of `prune-opd train`: 0, 75 if a signal made it save and stop, else what failed.

    Raises:
        UserError: the checks refuse the run, a line for each problem. Nothing has been written or started then.

    torch and vLLM are imported in the ranks alone. Call it from the main thread: it passes signals on.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"train takes a TrainConfig, and this is a {type(config).__name__}: `prune-opd sft` runs it")
    return train_config(config, Path(run_dir) if run_dir else None, nproc, resume)
