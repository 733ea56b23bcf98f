"""In the place of `prune_opd/cli/ready.py`: ranks are forked, and nothing was imported for them."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path


def get_ready(kind: str) -> None:
    if where := os.environ.get("READY_WAITS"):  # until a test has done what it does at this time
        Path(where, "importing").touch()
        while not Path(where, "go").exists():
            time.sleep(0.02)
    match os.environ.get("READY_DOES"):
        case "thread":
            threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        case "fail":
            raise ImportError("no such library")
