"""Ending well: signals that every rank obeys together, and a watchdog for the rank that has stopped answering.

Neither waits for Python's main thread, which may be inside a collective or a kernel for minutes. Signals go through a
pipe to a thread of their own, and faulthandler's C thread writes the stacks without the interpreter lock.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO

from prune_opd.process import end_with_parent
from prune_opd.ranks.launcher import ASKING, ONE_WISH

LAST_WORDS = 5.0  # seconds that a rank has to write its stacks before another rank's watchdog ends the run


class Interruption:
    """SIGTERM or SIGUSR1 asks the run to save and end. A second one after `ONE_WISH` ends this process at once."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        for number in ASKING:
            signal.signal(number, _nothing)  # Python writes only signals with a handler to the pipe
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_be_an_ordinary_child)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)  # what came while the ranks were made ready comes now

    def agreed(self) -> bool:
        """Whether any rank was asked to end. Collective, so that all ranks end after the same step."""
        import torch
        import torch.distributed as dist

        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        asked = torch.tensor(float(self._since is not None), device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())

    def _listen(self) -> None:
        while numbers := os.read(self._reader, 1):
            number, now = numbers[0], time.monotonic()
            if number not in ASKING:
                continue
            if self._since is None:
                self._since = now
            elif now - self._since > ONE_WISH:
                os._exit(128 + number)  # without any clean-up, so nothing on the disk is touched


def _nothing(number: int, frame: FrameType | None) -> None:
    pass


def _be_an_ordinary_child() -> None:
    """In a fork of a rank, which writes a checkpoint: signals end it as usual, and it ends with the rank."""
    signal.set_wakeup_fd(-1)
    for number in ASKING:
        signal.signal(number, signal.SIG_DFL)
    end_with_parent(signal.SIGKILL)


class Watchdog:
    """Ends the run when a phase takes longer than `minutes` on this rank: it, or a rank it waits for, is stuck.

    Every rank has a watchdog, and all ranks enter the same phases. So each rank that still can writes its stacks to
    `stacks/rank_N.txt`, and a moment later the first of them ends the run with exit code 1. 0 minutes: never.
    """

    def __init__(self, minutes: float, folder: Path, rank: int) -> None:
        self.seconds, self.path, self.rank = minutes * 60, folder / f"rank_{rank}.txt", rank
        self._phase = "start"
        self._file: IO[str] | None = None
        self._bark: threading.Timer | None = None

    def enter(self, phase: str) -> None:
        """A phase begins, and its time starts."""
        self.stop()
        self._phase = phase
        if not self.seconds:
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")  # after the stacks of earlier launches
        faulthandler.dump_traceback_later(self.seconds, file=self._file)
        self._bark = threading.Timer(self.seconds + LAST_WORDS, self._end)
        self._bark.daemon = True
        self._bark.start()

    def stop(self) -> None:
        """The run is over, or another phase begins."""
        faulthandler.cancel_dump_traceback_later()
        if self._bark is not None:
            self._bark.cancel()
        self._bark = None

    def close(self) -> None:
        """Stop for good, and remove the file if it has no stacks."""
        self.stop()
        if self._file is not None:
            self._file.close()
            self._file = None
            if self.path.stat().st_size == 0:
                self.path.unlink()
            with suppress(OSError):  # not empty, or another rank was first
                self.path.parent.rmdir()

    def _end(self) -> None:
        print(
            f"error: rank {self.rank} has been in phase {self._phase} for {self.seconds:g} seconds: it, or a rank it "
            f"waits for, has stopped answering. The stacks of the ranks are in {self.path.parent}; if the phase is "
            "just long, raise survival.watchdog_minutes",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
