"""The `prune-opd` command with forked ranks, for tests in which the command line itself is not in question.

The process that runs `cli.main` is a fork too. What differs from the real command: no torchrun, no new interpreters.
Signals to a run, its launcher and a whole quickstart are tested with the real one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.forked import client
from tests.forked.client import Done


def run_command(
    *arguments: str | Path, folder: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 300.0
) -> Done:
    """`prune-opd arguments…` in `folder`, else here. AssertionError, with all output, when the time is up."""
    done = client.launch(
        "eager", arguments, 0, client.environment(env), folder=folder, timeout=timeout, apart=True
    )  # fmt: skip
    assert done.code is not None, f"prune-opd {arguments}: not done after {timeout:g} s\n{done.stdout}\n{done.stderr}"
    return done
