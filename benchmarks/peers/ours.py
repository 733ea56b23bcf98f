"""The contenders `ours` of `prune-opd bench peers`: a rank of a run of ours that takes its steps when they are due.

It is loop.py's own step on run.py's own parts; only the driver differs: turns, a stopwatch round each step, and the
student as a Hugging Face directory after some of them.

    torchrun … -m benchmarks.peers.ours JOB.json
"""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

from benchmarks.peers.turns import Job, StepLog, rank, wait_for_turn
from prune_opd.cli.worker import run_reported
from prune_opd.config import TrainConfig
from prune_opd.config.yaml import load_config
from prune_opd.process import end_with_parent


def train(job: Job) -> int:
    """All of the job's steps, each when it is this contender's turn."""
    import torch

    from prune_opd.loop import step
    from prune_opd.run import prepare

    config = load_config(Path(job.config))
    assert isinstance(config, TrainConfig)
    folder, run_dir = Path(job.folder), Path(job.folder) / "run"
    log = StepLog(folder, rank())
    run = prepare(config, run_dir, "never")
    log.ready()
    for number in range(1, job.steps + 1):
        wait_for_turn(folder, number)
        log.begin()
        step(run)
        log.end(number)  # its tokens and phases are in the run's metrics.jsonl
        if number in job.save_at:
            run.export()
            if run.layout.is_main:
                shutil.move(run_dir / "hf", job.hf_dir(number))
                job.saved(number)
    log.finish(threads=torch.get_num_threads(), torch=torch.__version__)
    run.rollout.engine.close()
    return 0


def main() -> int:
    end_with_parent(signal.SIGKILL)
    return run_reported(lambda: train(Job.read(Path(sys.argv[1]))))


if __name__ == "__main__":
    sys.exit(main())
