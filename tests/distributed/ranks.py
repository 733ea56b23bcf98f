"""Start real ranks from a test: `torchrun` in a subprocess, on gloo, with one thread a rank.

A worker is a plain script that calls `torch.distributed.init_process_group("gloo")` itself, and
`destroy_process_group()` at its end (a rank that leaves gloo's threads behind aborts with SIGABRT). It reports through
its exit code (an assertion that fails) or through files whose paths it gets as arguments.
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

REPOSITORY = Path(__file__).resolve().parents[2]


def run_ranks(
    script: str | Path,
    nproc: int,
    args: Sequence[str | Path] = (),
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run `script args…` on `nproc` ranks of this machine and return what they printed (stdout and stderr together).

    timeout: seconds for the whole launch. env: added to this process's environment.
    AssertionError, with the ranks' output, when a rank fails or the time is up; no rank outlives the call.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    command += [str(script), *map(str, args)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # Workers import prune_opd and tests.* from this checkout, whatever the directory pytest was started in.
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
        **(env or {}),
    }
    process = subprocess.Popen(
        command,
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
            raise AssertionError(
                f"{Path(script).name} on {nproc} ranks: not done after {timeout:g} s\n{output}"
            ) from None
        raise
    if process.returncode != 0:
        raise AssertionError(f"{Path(script).name} on {nproc} ranks: exit code {process.returncode}\n{output}")
    return output


def read_ranks(folder: Path, ranks: int) -> list[Any]:
    """What each rank has left in rank<r>.json."""
    return [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


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
