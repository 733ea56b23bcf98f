"""The `prune-opd` command with forked ranks, for tests in which the command line itself is not in question.

The process that runs `cli.main` is a fork too. What differs from the real command: no torchrun, no new interpreters.
Signals to a run, its launcher and a whole quickstart are tested with the real one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.forked import client


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def run_command(
    *arguments: str | Path, folder: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 300.0
) -> Done:
    """`prune-opd arguments…` in `folder`, else here. AssertionError, with all output, when the time is up."""
    words = list(map(str, arguments))
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        files = (out.fileno(), err.fileno())
        try:
            code = client.launch("eager", words, 0, client.environment(env), files, folder=folder, timeout=timeout)
        except client.TimeIsUp:
            code = None
        stdout, stderr = (_text(file) for file in (out, err))
    assert code is not None, f"prune-opd {words}: not done after {timeout:g} s\n{stdout}\n{stderr}"
    return Done(code, stdout, stderr)


def _text(file: object) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
