"""What a test needs, as marks: `ranks` where it starts processes that import torch, megatron or vLLM, and `slurm`.

`make test` runs two pytest processes side by side. One has the tests that start ranks: two of them fill both cores, and
one fork server is enough. The other has all the rest, and Slurm's tests, which mostly wait.
"""

from __future__ import annotations

from typing import Any

import pytest

# Tests in these folders, and those of modules that have one of these functions, start ranks.
FOLDERS = ("tests/benchmarks/", "tests/cluster/", "tests/distributed/", "tests/end_to_end/", "tests/faults/")
STARTERS = ("run_ranks", "run_command", "start_ranks")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        if item.nodeid.startswith(FOLDERS) or any(hasattr(item.module, name) for name in STARTERS):
            item.add_marker(pytest.mark.ranks)
        if item.nodeid.startswith("tests/cluster/"):
            item.add_marker(pytest.mark.slurm)
