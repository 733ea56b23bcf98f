"""The clock of a training step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prune_opd.platform import Platform


class PhaseClock:
    """Seconds by phase, device work included, and with what the phase brings to the device or takes from it.

    `cpu_*` beside `time_*` are the CPU seconds of this process (all threads): on a busy machine they still hold.
    `memory_*` is what the phase had of the device's memory. enter: told of each phase before it begins.
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

    def record(self) -> dict[str, float]:
        self._stop("step", self.started)
        return self.measured

    def _stop(self, phase: str, begin: tuple[float, float]) -> None:
        wall, cpu = self._now()
        self.measured |= {f"time_{phase}": wall - begin[0], f"cpu_{phase}": cpu - begin[1]}

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()
