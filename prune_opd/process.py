"""What a process of this project needs to know of its machine before anything heavy is imported."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PR_SET_PDEATHSIG = 1
FILE_WIDTH = 160  # of tables that go to a file or a pipe: nothing there can be wrapped or scrolled
# Environment variables of ranks: the command line that started them, and when it did (`time.monotonic`).
COMMAND, BEGAN = "PRUNE_OPD_COMMAND", "PRUNE_OPD_BEGAN"

_listeners: list[Callable[[str], None]] = []
_watchers: list[Callable[[Callable[[], str]], None]] = []


def hear(listener: Callable[[str], None] | None) -> None:
    """From now on `listener` gets what `tell` says; None: nobody does."""
    _listeners[:] = [] if listener is None else [listener]


def tell(text: str) -> None:
    """Say what this process is doing, if anybody listens: "reading teacher, file 3 of 7"."""
    for listener in _listeners:
        listener(text)


def watch(watcher: Callable[[Callable[[], str]], None] | None) -> None:
    """From now on `watcher` gets what `progress` is given; None: nobody does."""
    _watchers[:] = [] if watcher is None else [watcher]


def watched() -> bool:
    return bool(_watchers)


def progress(describe: Callable[[], str]) -> None:
    """How far this process is within what it is doing, if anybody watches: "responses 37/64, 18,240 tokens".

    For loops over engine steps, micro-batches or tensors: `describe` is called only when it is time to show something,
    and must not wait for a device.
    """
    for watcher in _watchers:
        watcher(describe)


def has_gpu() -> bool:
    """Whether torch would find a CUDA device: a CUDA build, a device node, and not hidden. Does not import torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    try:
        cpu_build = importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        cpu_build = True
    return not cpu_build and Path("/dev/nvidiactl").exists()


def rank_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a rank, but for what torchrun adds."""
    settings = dict(env)
    settings.setdefault("OMP_NUM_THREADS", "1")
    if not has_gpu():
        settings.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # vLLM's note on NUMA binding
        settings.setdefault("TORCHDYNAMO_DISABLE", "1")  # bound when megatron is imported; on a GPU vLLM compiles
    return settings


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection in here: for what makes objects that stay. It was a sixth of the imports' CPU seconds."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def end_with_parent(number: signal.Signals) -> None:
    """Ask the kernel for a signal when the process that started this one is gone (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)


def table_console() -> Console:
    """Where a command prints its tables: as wide as the terminal, and wide enough where there is none."""
    from rich.console import Console  # not for a rank's launcher

    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)
