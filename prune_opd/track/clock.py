"""The clock of a training step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from prune_opd.platform import Platform

Clock = Callable[[str], AbstractContextManager[Any]]  # what is done in it is the phase that is named


class PhaseClock:
    """Times the phases of a step; device work and memory moves count too.

    `time_*`: seconds of wall clock. `cpu_*`: CPU seconds of this process, all threads, which hold on a busy machine
    too. `memory_*`: device memory of the phase [bytes]. `taken_*`: what is in use of the device at its end [bytes].
    """

    def __init__(self, machine: Platform, enter: Callable[[str], None]):
        self.machine, self.enter, self.started = machine, enter, self._now()
        self.measured: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = self._now()
        self.machine.watch_memory()
        self.enter(phase)
        yield
        self.machine.synchronize()
        self._stop(phase, begin)
        self.measured[f"memory_{phase}"] = self.machine.memory()
        if (taken := self.machine.taken()) is not None:
            self.measured[f"taken_{phase}"] = taken

    def record(self) -> dict[str, float]:
        self._stop("step", self.started)
        return self.measured

    def _stop(self, phase: str, begin: tuple[float, float]) -> None:
        wall, cpu = self._now()
        self.measured |= {f"time_{phase}": wall - begin[0], f"cpu_{phase}": cpu - begin[1]}

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()
