"""What a test needs: the mark `ranks`, and on several processes the group that keeps tests of one kind together.

`make test` runs two pytest processes. One has the tests that start ranks: two ranks fill both cores, and one fork server
is enough. The other has all the rest, module by module.
"""

from __future__ import annotations

from typing import Any

import pytest

# A module with one of these starts processes that import torch, megatron or vLLM.
STARTERS = ("run_ranks", "run_command", "ended_run", "start_ranks", "prune_opd_command", "train")
ALONE = "tests/cluster/"  # mostly waits for Slurm


def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        if any(hasattr(item.module, name) for name in STARTERS):
            item.add_marker(pytest.mark.ranks)
        ranks = item.get_closest_marker("ranks") and not item.nodeid.startswith(ALONE)
        item.add_marker(pytest.mark.xdist_group("ranks" if ranks else item.nodeid.partition("::")[0]))
    items.sort(key=lambda item: (not item.get_closest_marker("ranks"), item.nodeid.startswith(ALONE)))
