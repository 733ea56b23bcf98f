"""What a test needs: the mark `ranks`, and on several processes the group that keeps tests of one kind together.

`make test` runs two pytest processes. One has the tests that start ranks: two of them fill both cores, and one fork
server is enough. The other has all the rest, module by module.
"""

from __future__ import annotations

from typing import Any

import pytest

# Tests in these folders, and those of modules that have one of these functions, start processes that import torch,
# megatron or vLLM.
FOLDERS = ("tests/benchmarks/", "tests/cluster/", "tests/distributed/", "tests/end_to_end/", "tests/faults/")
STARTERS = ("run_ranks", "run_command", "start_ranks")
WAITING = "tests/cluster/"  # for Slurm, most of the time: beside the ranks, not in a row with them


@pytest.hookimpl(tryfirst=True)  # before xdist, which reads the groups in the same hook
def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        starts = item.nodeid.startswith(FOLDERS) or any(hasattr(item.module, name) for name in STARTERS)
        if starts:
            item.add_marker(pytest.mark.ranks)
        together = starts and not item.nodeid.startswith(WAITING)
        item.add_marker(pytest.mark.xdist_group("ranks" if together else item.nodeid.partition("::")[0]))
    items.sort(key=lambda item: (item.get_closest_marker("ranks") is None, item.nodeid.startswith(WAITING)))
