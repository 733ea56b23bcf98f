"""The contenders `ours` of `prune-opd bench peers`: one rank of our run, which takes its steps when they are due.

It is loop.py's own step on run.py's own parts; only the driver differs: turns, a stopwatch round each step, and the
student as a Hugging Face directory after some of them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.common import answer
from benchmarks.peers.turns import Step, Turns
from prune_opd.config import TrainConfig
from prune_opd.config.yaml import load_config


def train(folder: str, steps: int, save_at: list[int], threads: int) -> list[Step]:
    """All steps of `folder`/config.yaml; the students of the steps in `save_at` go to `folder`/hf-STEP."""
    from prune_opd.loop import step
    from prune_opd.run import prepare

    home = Path(folder)
    config = load_config(home / "config.yaml")
    assert isinstance(config, TrainConfig)
    run = prepare(config, home / "run", "never")
    turns = Turns(home)
    for number in range(1, steps + 1):
        turns.begin(number)
        step(run)
        turns.end(number)  # its tokens and phases are in the run's metrics.jsonl
        if number in save_at:
            run.export()
            if run.layout.is_main:
                shutil.move(home / "run" / "hf", home / f"hf-{number}")
    run.rollout.engine.close()
    return turns.steps


if __name__ == "__main__":
    answer(train)
