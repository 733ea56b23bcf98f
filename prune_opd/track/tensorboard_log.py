"""TensorBoard event files, where `track.tensorboard` asks for them: the scalars of metrics.jsonl, under `tensorboard/`.

tensorboardX writes them (a small package without TensorBoard itself), imported when a run starts and not before. Like
wandb it is never a reason for a run to stop.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prune_opd.config import TrackConfig
from prune_opd.track.metrics import Record
from prune_opd.track.wandb_log import flatten

PIN = "tensorboardX==2.6.5"


def tensorboard_problems(track: TrackConfig) -> list[str]:
    """A problem if `track.tensorboard` is on and its package is not installed."""
    if not track.tensorboard or importlib.util.find_spec("tensorboardX") is not None:
        return []
    return [f"track.tensorboard = true needs tensorboardX, which is not installed: pip install {PIN}, or set it false"]


class TensorBoardLog:
    """The event files of a run, or none.

    Args:
        folder: where they go; None writes nothing.
        resume_step: steps that the checkpoint had finished; TensorBoard leaves out what older files have of later ones.
        warn: takes the one sentence about a failure, after which nothing is written any more.
    """

    def __init__(self, folder: Path | None, resume_step: int, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._writer: Any = None
        if folder is not None:
            self._attempt("starting", lambda: self._start(folder, resume_step))

    def log(self, record: Record) -> None:
        """Writes the numbers of one record under its own `step`; a list is one curve a bin, as in wandb."""
        numbers = {key: value for key, value in flatten(record).items() if isinstance(value, int | float)}
        self._attempt("logging", lambda: self._write(numbers, record["step"]))

    def close(self) -> None:
        """Ends the file. Safe to call twice."""
        if self._writer is not None:
            self._attempt("closing", self._writer.close)
            self._writer = None

    def _start(self, folder: Path, resume_step: int) -> None:
        from tensorboardX import SummaryWriter

        # Files are named by the second: a job that goes on at once would write over the one before.
        suffix = f".{resume_step}"
        purge = resume_step + 1 if resume_step else None
        self._writer = SummaryWriter(str(folder), purge_step=purge, filename_suffix=suffix)

    def _write(self, numbers: dict[str, float], step: int) -> None:
        if self._writer is not None:
            for key, value in numbers.items():
                self._writer.add_scalar(key, value, step)
            self._writer.flush()

    def _attempt(self, doing: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever it raises, training goes on
            self._writer = None
            brief = str(error).partition("\n")[0]
            self._warn(f"TensorBoard stopped while {doing} ({type(error).__name__}: {brief}): the run goes on")
