"""How the contenders of `prune-opd bench peers` take turns of a few steps each.

All of them stay up for the whole benchmark, and one at a time works; the others look into their folder now and then.

    FOLDER/turn        written by the benchmark (Contest): the last step that the contender's ranks may take
    FOLDER/due-RANK    written by a rank (Turns): the step that it waits to begin; all before it is done

A contender whose last step is done ends, which is the end of its last turn. Where the benchmark ends early it takes
`turn` away, and who waits ends, too. No torch here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common import cpu_time, measure, peak_memory, rank
from prune_opd.errors import UserError

POLL_SECONDS = 0.2
TIMEOUT = 7200  # seconds of a contender, waiting included

Step = dict[str, float]


class Turns:
    """A rank's side: it waits until a step is due, and measures the step from `begin` to `end` into `steps`."""

    def __init__(self, folder: Path) -> None:
        self.steps: list[Step] = []
        self._turn, self._due = folder / "turn", folder / f"due-{rank()}"
        self._wall = self._cpu = 0.0

    def begin(self, step: int) -> None:
        """Wait until `step` is due. FileNotFoundError when the benchmark is gone."""
        self._due.write_text(str(step))
        while _number(self._turn) < step:
            time.sleep(POLL_SECONDS)
        self._wall, self._cpu = time.perf_counter(), cpu_time()

    def end(self, step: int, owners: Callable[[], dict[str, float]] = dict, **record: float) -> None:
        """The step is over; `record` is added to it, and what `owners` then says, in no time that is measured.

        CPU seconds are of all threads, the peak of the whole process.
        """
        wall, cpu = time.perf_counter() - self._wall, cpu_time() - self._cpu
        self.steps.append({"step": step, "wall_s": wall, "cpu_s": cpu, "peak_bytes": peak_memory(), **record})
        self.steps[-1] |= owners()


class Contest:
    """The benchmark's side of one contender: it starts when this is made, and ends by itself after its last step."""

    def __init__(self, pool: ThreadPoolExecutor, name: str, module: str, folder: Path, **how: Any) -> None:
        """`how` is what `common.measure` takes; the contender answers with the steps of its rank."""
        self._due = [folder / f"due-{number}" for number in range(how["ranks"] or 1)]
        self._name, self._turn = name, folder / "turn"
        self._turn.write_text("0")
        self._process: Future[list[list[Step]]] = pool.submit(
            measure, module, what=f"contender {name}", timeout=TIMEOUT, **how
        )

    def wait_for(self, step: int) -> None:
        """Until every rank waits to begin `step`, or the contender has ended. Raises how it failed, or ended early."""
        while not self._process.done() and not all(due.exists() and _number(due) >= step for due in self._due):
            time.sleep(POLL_SECONDS)
        if self._process.done() and len(self._process.result()[0]) < step - 1:
            raise UserError(f"contender {self._name} ended before its last step")

    def go_on(self, last: int) -> None:
        """One turn, to the end of step `last`. Raises how the contender failed, if it does."""
        self._turn.write_text(str(last))
        self.wait_for(last + 1)

    def steps(self) -> list[tuple[Step, ...]]:
        """Every step as each rank measured it, after the last turn."""
        return list(zip(*self._process.result(), strict=True))

    def close(self) -> None:
        """What still waits for a turn ends."""
        self._turn.unlink()


def _number(path: Path) -> int:
    return int(path.read_text() or 0)  # empty while it is being written
