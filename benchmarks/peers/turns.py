"""How the contenders of `prune-opd bench peers` take turns of a few steps each.

All of them stay up for the whole benchmark, and one at a time works; the others wait without using the machine.

    benchmark (Contest)                      a rank (Turns)
    waits for all connections          ◀──   builds everything, then connects
    sends the last step of the turn    ──▶   works on to the end of that step
    gets the turn's records            ◀──   hands them in and waits for the next turn

A side that ends closes its connections, so the other learns of it at once. No torch here.
"""

from __future__ import annotations

import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

from benchmarks.common import cpu_time, measure, peak_memory
from prune_opd.errors import UserError

POLL_SECONDS = 0.5
TIMEOUT = 7200  # seconds of a contender, waiting included

Step = dict[str, float]


class Turns:
    """A rank's side: it waits until a step is due, and measures the step from `begin` to `end`."""

    def __init__(self, address: str) -> None:
        self._benchmark = Client(address)
        self._allowed, self._steps = 0, list[Step]()
        self._wall = self._cpu = 0.0

    def begin(self, step: int) -> None:
        """Wait until `step` is due. EOFError when the benchmark is gone."""
        if step > self._allowed:
            if self._steps:
                self.hand_in()
            self._allowed = self._benchmark.recv()
        self._wall, self._cpu = time.perf_counter(), cpu_time()

    def end(self, step: int, **record: float) -> None:
        """The step is over; `record` is added to it. CPU seconds are of all threads, the peak of the whole process."""
        wall, cpu = time.perf_counter() - self._wall, cpu_time() - self._cpu
        self._steps.append({"step": step, "wall_s": wall, "cpu_s": cpu, "peak_bytes": peak_memory(), **record})

    def hand_in(self) -> None:
        """The turn is over, and all that belongs to it is there. A rank calls this itself after its last step only."""
        self._benchmark.send(self._steps)
        self._steps = []


class Contest:
    """The benchmark's side of one contender: it starts when this is made, and ends by itself after its last step."""

    def __init__(self, pool: ThreadPoolExecutor, name: str, module: str, folder: Path, **how: Any) -> None:
        """`how` is what `common.measure` takes; its `request` gets the address to connect to."""
        self.name, self.ranks, self.steps = name, how["ranks"] or 1, 0
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(folder / "turns"))
        self._server.listen()
        self._server.settimeout(POLL_SECONDS)
        self._connections: list[Connection] = []
        request: dict[str, Any] = how.pop("request") | {"address": str(folder / "turns")}
        self._process: Future[Any] = pool.submit(measure, module, request, f"contender {name}", timeout=TIMEOUT, **how)

    def wait_until_built(self) -> None:
        """UserError if the contender ends before that."""
        while len(self._connections) < self.ranks:
            if self._process.done():
                raise self._failure()
            with suppress(TimeoutError):
                self._connections.append(Connection(self._server.accept()[0].detach()))

    def go_on(self, last: int) -> list[list[Step]]:
        """One turn, to the end of step `last`: the steps of each rank. UserError if the contender ends before that."""
        try:
            for connection in self._connections:
                connection.send(last)
            steps = [connection.recv() for connection in self._connections]
        except (EOFError, OSError):
            raise self._failure() from None
        self.steps = last
        return steps

    def close(self) -> None:
        """What still waits for a turn ends."""
        for connection in self._connections:
            connection.close()
        self._server.close()

    def _failure(self) -> BaseException:
        return self._process.exception() or UserError(f"contender {self.name} ended before its last step")
