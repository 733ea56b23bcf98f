"""What moves while something takes its time: now and then a line of what `process.progress` is given."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from prune_opd.process import hear, watch

TERMINAL, PLAIN = 0.5, 30.0  # seconds between two looks, on a terminal and in plain lines


def is_terminal(file: TextIO) -> bool:
    """Whether control codes are understood there."""
    return file.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


class Moving:
    """Hands on one description in `every` seconds, the first of them `every` seconds after the last `begin`."""

    def __init__(self, say: Callable[[str], None], every: float) -> None:
        self._say, self._every = say, every
        self.begin()

    def begin(self) -> None:
        self._next = time.monotonic() + self._every

    def __call__(self, describe: Callable[[], str]) -> None:
        if (now := time.monotonic()) >= self._next:
            self._next = now + self._every
            self._say(describe())


@contextmanager
def shown(doing: str, speaks: bool = True, file: TextIO | None = None) -> Iterator[None]:
    """Shows how a command gets on: one line of a terminal that what is printed next writes over; elsewhere plain lines.

    speaks: whether this process does, of several ranks. file: standard error by default.
    """
    if not speaks:
        yield
        return
    out = file or sys.stderr
    terminal = is_terminal(out)

    def say(text: str) -> None:
        line = f"{doing}: {text}"
        out.write(f"\x1b[2K{line[: _width(out) - 1]}\r" if terminal else f"{line}\n")
        out.flush()

    watch(Moving(say, TERMINAL if terminal else PLAIN))
    if terminal:
        hear(say)
    try:
        yield
    finally:
        watch(None)
        if terminal:
            hear(None)
            out.write("\x1b[2K")
            out.flush()


def _width(file: TextIO) -> int:
    try:
        return os.get_terminal_size(file.fileno()).columns or 80  # a terminal of no size says 0
    except (OSError, ValueError):
        return 80
