"""What a test needs, as marks: `ranks` where it starts processes that import torch, megatron or vLLM, `runs`, `slurm`.

`make test` runs three pytest processes side by side. Two have the tests that start ranks, which wait for one another a
third of their time: one of whole runs, one of parts. The third has all the rest, and Slurm's tests, which mostly wait.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads would wait for one another beside the other process

# Tests in these folders, and those of modules that have one of these functions, start ranks.
RUNS = ("tests/benchmarks/", "tests/end_to_end/", "tests/faults/")
PACKAGED = ("tests/launch/test_local.py", "tests/packaging/test_gpu_check.py", "tests/packaging/test_wheel.py")
FOLDERS = (*RUNS, *PACKAGED, "tests/cluster/", "tests/distributed/", "tests/rehearse/")
STARTERS = ("run_ranks", "run_worker", "run_command", "start_ranks")
# What scripts/test.sh asks for, beside `runs`, and `make test-fast`.
PARTS, OTHERS, FAST = "ranks and not runs and not slurm", "slurm or not ranks", "not ranks"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import what only another process runs."""
    wanted = config.option.markexpr
    if collection_path.suffix != ".py" or wanted not in ("runs", PARTS, OTHERS, FAST):
        return None
    name = collection_path.relative_to(config.rootpath).as_posix()
    if name.startswith(RUNS) or wanted == "runs":
        taken = name.startswith(RUNS) and wanted == "runs"
    elif name.startswith("tests/cluster/"):
        taken = wanted == OTHERS
    elif name.startswith(FOLDERS):
        taken = wanted == PARTS
    else:
        text = collection_path.read_text(encoding="utf-8") if wanted == PARTS else ""
        taken = wanted != PARTS or any(starter in text for starter in STARTERS)
    return None if taken else True


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        if item.nodeid.startswith(FOLDERS) or any(hasattr(item.module, name) for name in STARTERS):
            item.add_marker(pytest.mark.ranks)
        if item.nodeid.startswith(RUNS):
            item.add_marker(pytest.mark.runs)
        if item.nodeid.startswith("tests/cluster/"):
            item.add_marker(pytest.mark.slurm)
