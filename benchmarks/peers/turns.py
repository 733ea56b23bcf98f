"""What `prune-opd bench peers` and its contenders agree on: the job, whose turn it is, and the record of a step.

A contender is one process, or several ranks, that stays up for the whole benchmark. It works through its steps only as
far as the file `allowed` in its folder says, so that contenders take turns of a few steps each on the same machine and
wait without using it. No torch on this side.
"""

from __future__ import annotations

import json
import os
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from prune_opd.errors import UserError

POLL_SECONDS = 0.05
PATIENCE_SECONDS = 900  # that a contender waits for its turn before it takes the benchmark for dead


@dataclass(frozen=True)
class Job:
    """What a contender trains. The recipe's settings that both sides take are in the run's resolved config."""

    folder: str  # gets ready-RANK, allowed, steps-RANK.jsonl, done-RANK.json, and hf-STEP/ after the steps in `save_at`
    config: str  # a resolved TrainConfig (config.yaml)
    steps: int
    save_at: tuple[int, ...]
    threads: int  # of each process
    microbatches: int  # that a process splits its part of the batch into (TRL; ours packs by tokens)

    def write(self) -> Path:
        path = Path(self.folder) / "job.json"
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @staticmethod
    def read(path: Path) -> Job:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return Job(**{**fields, "save_at": tuple(fields["save_at"])})

    def hf_dir(self, step: int) -> Path:
        return Path(self.folder) / f"hf-{step}"

    def saved(self, step: int) -> None:
        """Say that the student after `step` steps is there, complete."""
        (self.hf_dir(step) / "saved").touch()


def allow(folder: Path, steps: int) -> None:
    """Let the contender in `folder` go on to the end of step `steps`."""
    partial = folder / "allowed.partial"
    partial.write_text(str(steps), encoding="utf-8")
    partial.rename(folder / "allowed")


def wait_for_turn(folder: Path, step: int, patience: float = PATIENCE_SECONDS) -> None:
    """Sleep until step `step` may begin. Raises `UserError` when nobody allows it in `patience` seconds."""
    path, end = folder / "allowed", time.monotonic() + patience
    while not path.exists() or int(path.read_text(encoding="utf-8")) < step:
        if time.monotonic() > end:
            raise UserError(f"step {step} was not allowed for {patience:.0f} s: is the benchmark still running?")
        time.sleep(POLL_SECONDS)


class StepLog:
    """A rank's steps: wall and CPU seconds (of all its threads) from `begin` to `end`, a line each."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.path = folder / f"steps-{rank}.jsonl"
        self._wall = self._cpu = 0.0

    def ready(self) -> None:
        """Say that everything is built and this rank waits for its first turn."""
        (self.folder / f"ready-{self.rank}").touch()

    def begin(self) -> None:
        self._wall, self._cpu = time.perf_counter(), cpu_seconds()

    def end(self, step: int, **record: float) -> None:
        """`record` is added to the line. The peak is of the whole process's life, in bytes."""
        line = {
            "step": step,
            "wall_s": time.perf_counter() - self._wall,
            "cpu_s": cpu_seconds() - self._cpu,
            "peak_bytes": memory("VmHWM"),
            **record,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def finish(self, **record: object) -> None:
        """Say that this rank's work is done."""
        path = self.folder / f"done-{self.rank}.json"
        path.with_suffix(".partial").write_text(json.dumps(record), encoding="utf-8")
        path.with_suffix(".partial").rename(path)


def read_steps(folder: Path, rank: int) -> list[dict[str, float]]:
    """The steps that a rank has finished so far; a line that is being written is not there yet."""
    path = folder / f"steps-{rank}.jsonl"
    if not path.exists():
        return []
    complete = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in complete.splitlines()]


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def memory(field: str) -> int:
    """A line of /proc/self/status, such as VmHWM, in bytes."""
    with open("/proc/self/status", encoding="utf-8") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))
