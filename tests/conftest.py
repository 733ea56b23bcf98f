"""What a test needs, as marks: `ranks` where it starts processes that import torch, megatron or vLLM, and `slurm`.

`make test` runs two pytest processes side by side. One has the tests that start ranks: two of them fill both cores, and
one fork server is enough. The other has all the rest, and Slurm's tests, which mostly wait.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads would wait for one another beside the other process

# Tests in these folders, and those of modules that have one of these functions, start ranks.
FOLDERS = ("tests/benchmarks/", "tests/cluster/", "tests/distributed/", "tests/end_to_end/", "tests/faults/")
STARTERS = ("run_ranks", "run_worker", "run_command", "start_ranks")
# What scripts/test.sh asks for.
RANKS, OTHERS = "ranks and not slurm", "slurm or not ranks"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import what only the other process of `make test` runs."""
    if collection_path.suffix != ".py" or config.option.markexpr not in (RANKS, OTHERS):
        return None
    name = f"{collection_path.relative_to(config.rootpath).as_posix()}"
    of_ranks = name.startswith(FOLDERS)
    if config.option.markexpr == OTHERS:
        return True if of_ranks and not name.startswith("tests/cluster/") else None
    text = collection_path.read_text(encoding="utf-8")
    return None if of_ranks or any(starter in text for starter in STARTERS) else True


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        if item.nodeid.startswith(FOLDERS) or any(hasattr(item.module, name) for name in STARTERS):
            item.add_marker(pytest.mark.ranks)
        if item.nodeid.startswith("tests/cluster/"):
            item.add_marker(pytest.mark.slurm)
