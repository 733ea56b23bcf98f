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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.forked import client
from tests.forked.client import REPOSITORY, Done


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
    if kind == "fresh":
        done = _torchrun(arguments, nproc, environment, timeout)
    else:
        done = client.launch(kind, arguments, nproc, environment, folder=REPOSITORY, timeout=timeout)
    if done.code != 0:
        how = f"not done after {timeout:g} s" if done.code is None else f"exit code {done.code}"
        raise AssertionError(f"{Path(script).name} on {nproc} ranks: {how}\n{done.stdout}")
    return done.stdout


def read_ranks(folder: Path, ranks: int) -> list[Any]:
    """What each rank has left in rank<r>.json."""
    return [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def _torchrun(arguments: Sequence[str], nproc: int, environment: Mapping[str, str], timeout: float) -> Done:
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc), *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except BaseException as reason:  # a test that was interrupted must not leave ranks behind either
        output = _stop(process)
        if isinstance(reason, subprocess.TimeoutExpired):
            return Done(None, output, "")
        raise
    return Done(process.returncode, output, "")


def _stop(process: subprocess.Popen[str]) -> str:
    """End torchrun and its ranks; what they had printed.

    torchrun gives each rank a session of its own, so the ranks are not in its process group: SIGTERM lets torchrun take
    them down itself, and SIGKILL is for a torchrun that does not.
    """
    process.terminate()
    try:
        output, _ = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    return output
