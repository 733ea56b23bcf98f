"""How much memory a piece of code takes at most beyond what was there: every allocation of torch's CPU allocator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes that `run` has held at one time. Scratch memory inside an operator counts too."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    kineto = profile.profiler.kineto_results  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted((event for event in kineto.events() if event.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
