"""Start real ranks from a test, on gloo, with one thread a rank: forked from a process that has imported everything.

A worker is a plain script that calls `torch.distributed.init_process_group("gloo")` itself, and
`destroy_process_group()` at its end. It reports through its exit code (an assertion that fails) or through files whose
paths it gets as arguments.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.forked import client
from tests.forked.client import REPOSITORY


def run_ranks(
    script: str | Path,
    nproc: int,
    args: Sequence[str | Path] = (),
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    kind: str = "eager",
) -> str:
    """Run `script args…` on `nproc` ranks of this machine and return what they printed (stdout and stderr together).

    timeout: seconds for the whole launch. env: added to this process's environment. kind: what the ranks find imported
    (`tests/forked/server.py`: eager or compiled), or "fresh": nothing, new interpreters under torchrun.
    AssertionError, with the ranks' output, when a rank fails or the time is up; no rank outlives the call.
    """
    arguments, environment = [str(script), *map(str, args)], client.environment(env)
    with tempfile.TemporaryFile() as file:
        try:
            if kind == "fresh":
                code = _torchrun(arguments, nproc, environment, file.fileno(), timeout)
            else:
                files = (file.fileno(), file.fileno())
                code = client.launch(kind, arguments, nproc, environment, files, folder=REPOSITORY, timeout=timeout)
        except client.TimeIsUp:
            code = None
        file.seek(0)
        output = file.read().decode(errors="replace")
    if code:
        raise AssertionError(f"{Path(script).name} on {nproc} ranks: exit code {code}\n{output}")
    if code is None:
        raise AssertionError(f"{Path(script).name} on {nproc} ranks: not done after {timeout:g} s\n{output}")
    return output


def read_ranks(folder: Path, ranks: int) -> list[Any]:
    """What each rank has left in rank<r>.json."""
    return [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def _torchrun(
    arguments: Sequence[str], nproc: int, environment: Mapping[str, str], output: int, timeout: float
) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    process = subprocess.Popen(
        [*command, *arguments], cwd=REPOSITORY, env=environment, stdout=output, stderr=output, start_new_session=True
    )
    try:
        return process.wait(timeout)
    except BaseException as reason:  # a test that was interrupted must not leave ranks behind either
        _stop(process)
        if isinstance(reason, subprocess.TimeoutExpired):
            raise client.TimeIsUp from None
        raise


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End torchrun and its ranks.

    torchrun gives each rank a session of its own, so the ranks are not in its process group: SIGTERM lets torchrun take
    them down itself, and SIGKILL is for a torchrun that does not.
    """
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
