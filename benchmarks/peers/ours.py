"""The contenders `ours` of `prune-opd bench peers`: one rank of our run, which takes its steps when they are due.

It is loop.py's own step on run.py's own parts; only the driver differs: turns, a stopwatch round each step, and the
student as a Hugging Face directory after some of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import answer, resident
from benchmarks.peers.memory import by_owner
from benchmarks.peers.turns import Step, Turns
from prune_opd.config import TrainConfig
from prune_opd.config.yaml import load_config

if TYPE_CHECKING:
    from torch import Tensor

    from prune_opd.run import Run


def train(folder: str, steps: int, save_at: list[int], threads: int) -> list[Step]:
    """All steps of `folder`/config.yaml; the students of the steps in `save_at` go to `folder`/hf-STEP."""
    from prune_opd.cli.ready import get_ready

    home = Path(folder)
    config = load_config(home / "config.yaml")
    assert isinstance(config, TrainConfig)
    get_ready("train" if config.rollout.enforce_eager is False else "train/eager")
    from prune_opd.loop import step
    from prune_opd.run import prepare

    imports = resident()
    run = prepare(config, home / "run", "never")
    turns = Turns(home)
    for number in range(1, steps + 1):
        turns.begin(number)
        step(run)
        # Its tokens and phases are in the run's metrics.jsonl.
        turns.end(number, lambda: by_owner(imports, owned(run)))
        if number in save_at:
            run.export()
            if run.layout.is_main:
                shutil.move(home / "run" / "hf", home / f"hf-{number}")
    run.rollout.engine.close()
    return turns.steps


def owned(run: Run) -> dict[str, Iterable[Tensor]]:
    """Who owns which of a rank's tensors between two steps."""
    trainer, llm = run.trainer, run.rollout.engine.llm
    optimizer: Any = trainer.optimizer
    inner = [one.optimizer for one in getattr(optimizer, "chained_optimizers", [optimizer])]
    chunks: Any = [*trainer.ddp]
    (engine,) = llm.collective_rpc(lambda worker: [*worker.model_runner.model.parameters()])
    (cache,) = llm.collective_rpc(lambda worker: [*worker.model_runner.kv_caches])
    teacher: Any = run.teacher
    return {
        "student": [weight for chunk in trainer.chunks for weight in chunk.parameters()],
        "gradients": [buffer.grad_data for chunk in chunks for buffer in chunk.buffers],
        "optimizer": [value for one in inner for value in states(one)],
        "teacher": [teacher.head_weight, *(weight for chunk in teacher.chunks for weight in chunk.parameters())],
        "engine": engine,
        "kv_cache": cache,
    }


def states(optimizer: Any) -> list[Tensor]:
    """The tensors that a torch optimizer keeps."""
    return [
        value for state in optimizer.state.values() for value in state.values() if hasattr(value, "untyped_storage")
    ]


if __name__ == "__main__":
    answer(train)
