"""Ranks of a command: how many there are, and the one place that decides whether this process is one of them.

prune-opd train …           starts ranks, and each of them runs `cli/worker.py`
torchrun … prune-opd train  is a rank already, and goes on with `cli/worker.py` itself
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

from prune_opd.cli import ready, worker
from prune_opd.config import RunConfig, TrainConfig
from prune_opd.config.yaml import save_config
from prune_opd.errors import UserError
from prune_opd.process import BEGAN, COMMAND
from prune_opd.ranks.launcher import start_ranks
from prune_opd.track.startup import IMPORTING, line

ASKED = "stopping: the step under way is finished and saved first; once more ends it at once, without that"
TORCHRUN = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what a rank has beside its RANK


def is_rank() -> bool:
    """Whether torchrun, or what speaks like it, started this process as one of its ranks.

    Raises UserError where only a part of a rank's environment is there: a RANK that somebody's shell has left.
    """
    if "RANK" not in os.environ:
        return False
    if missing := [name for name in TORCHRUN if name not in os.environ]:
        raise UserError(
            f"RANK = {os.environ['RANK']!r} is set and {', '.join(missing)} are not, so torchrun did not start this: "
            "unset RANK"
        )
    return True


def rank_count(nproc: int | None, config: RunConfig, nodes: int = 1) -> int:
    """Ranks of the whole command: those there are, or `nproc` (--nproc), or what the config has on `nodes` nodes."""
    if is_rank():
        return int(os.environ.get("WORLD_SIZE", "1"))
    return nproc or config.parallel.nproc * nodes


def on_ranks(nproc: int, command: str, *arguments: str, config: RunConfig | None = None) -> int:
    """Run a command of `cli/worker.py` on `nproc` new ranks or, as a rank, in this process. Returns the exit code.

    config: what the command takes first; the ranks read it from a file that goes away with them.
    """
    with tempfile.TemporaryDirectory(prefix="prune-opd-") as folder:
        words = [command, *arguments]
        if config is not None:
            resolved = Path(folder) / "config.yaml"
            save_config(config, resolved)
            words.insert(1, str(resolved))
        if not is_rank():
            env = os.environ | {COMMAND: shlex.join(["prune-opd", *sys.argv[1:]]), BEGAN: str(time.monotonic())}
            if command == "train":
                print(line(0, IMPORTING), flush=True)
            asked, program = ASKED if command == "train" else "", ["-m", "prune_opd.cli.worker", *words]
            return start_ranks(program, nproc, env, asked, (ready.__name__, f"{command}/{model_of(config)}"))
        part = worker.parse(words)
    return worker.run(part)


def model_of(config: RunConfig | None) -> str:
    """How vLLM runs the model in these ranks, as `cli/ready.py` has it."""
    compiled = isinstance(config, TrainConfig) and config.rollout.enforce_eager is False
    return "compiled" if compiled else "eager"
