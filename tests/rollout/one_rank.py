"""What one rank with engines has found, for tests that look at it from several sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.distributed.ranks import run_ranks
from tests.models import write_model


def run_worker(worker: Path, folder: Path, file: str) -> dict[str, Any]:
    """Run `worker folder folder` on a rank, with two random models in the folder; what it has left in `file` there."""
    write_model(folder / "student", seed=1)
    write_model(folder / "teacher", seed=2)
    run_ranks(worker, 1, [folder, folder], timeout=180)
    found: dict[str, Any] = json.loads((folder / file).read_text())
    return found
