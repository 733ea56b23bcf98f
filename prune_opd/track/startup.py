"""What a run says while it starts: a line for each thing that takes its time, with the seconds since the start."""

from __future__ import annotations

import os
import time
from types import TracebackType

from prune_opd.process import BEGAN, hear

IMPORTING = "importing torch, megatron-core and vLLM"


class StartUp:
    """Listens to `process.tell`. The rank that speaks prints every line at once; `lines` keeps them for the log."""

    def __init__(self, speaks: bool) -> None:
        self._speaks, self._began = speaks, float(os.environ.get(BEGAN) or time.monotonic())
        self.lines: list[str] = []

    def __enter__(self) -> StartUp:
        hear(self._hear if self._speaks else None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        hear(None)

    def _hear(self, text: str) -> None:
        self.lines.append(line(time.monotonic() - self._began, text))
        print(self.lines[-1], flush=True)


def line(seconds: float, text: str) -> str:
    return f"{seconds:6.1f} s  {text}"
