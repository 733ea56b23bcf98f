"""One gloo device for all process groups of a rank, and so one thread that waits for their sockets.

torch gives each group a device of its own. A device's thread wakes up 100 times a second, whatever happens: with the
33 groups of a rank that is 2 % of a core, and a quarter of all CPU seconds where a process goes through many layouts.
"""

from __future__ import annotations

import functools
import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

THREADS = 2  # a device, that run a group's collectives: as torch has it
NO_TIME_GIVEN = timedelta(minutes=30)  # torch's own


def share_device() -> None:
    """Groups that this process makes from here on have one device. Safe to call again."""
    gloo: Any = dist.ProcessGroupGloo
    make = gloo.__init__
    if getattr(make, "shares_device", False):
        return

    @functools.wraps(make)
    def with_options(group: Any, store: Any, rank: int, size: int, *given: Any, **named: Any) -> None:
        (last,) = (*given, *named.values()) or (NO_TIME_GIVEN,)
        if isinstance(last, timedelta):
            options = gloo._Options()
            options._devices = devices(os.getpid())
            options._threads = THREADS * len(options._devices)
            options._timeout = last
            last = options
        make(group, store, rank, size, last)

    with_options.shares_device = True  # type: ignore[attr-defined]
    gloo.__init__ = with_options


@functools.cache
def devices(process: int) -> list[Any]:
    """One for each interface in GLOO_SOCKET_IFNAME, as torch has it; a fork has its own, since it lacks the thread."""
    gloo: Any = dist.ProcessGroupGloo
    names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    return [gloo.create_device(interface=name) for name in names] or [gloo.create_default_device()]
