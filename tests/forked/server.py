"""A process that has imported torch, megatron-core and vLLM once, and forks what tests run from itself.

    pytest ── server (this module, one thread, nothing running in it)
                └─ launch: a fork that is torchrun's agent, as in a real run (`prune_opd/ranks/launcher.py`)
                     ├─ rank 0: a fork of that, as fresh as a new interpreter (`prune_opd/ranks/forked.py`)
                     └─ rank 1 …

What differs from a real run: the agent is a fork too, so launches share the imports, 14 CPU seconds.

The kernel ends every process here with the one above it, and what a launch leaves behind is ended before the next:
nothing outlives its launch, and no launch pytest.

    python -m tests.forked.server KIND SOCKET

It answers requests on the socket, one at a time: JSON with two file descriptors (stdout and stderr of the launch) in,
the process group of the launch and then its exit code out.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prune_opd.process import end_with_parent, rank_environment, uncollected
from prune_opd.ranks.forked import fork, keep_pages, make_seats, run_fresh, why_not
from prune_opd.ranks.launcher import shell_code

PR_SET_CHILD_SUBREAPER = 36
MESSAGE = 1 << 20  # bytes
# What kinds of launches find imported beside nothing at all ("bare") and the command line alone, without torch
# ("light"), as `prune_opd/cli/ready.py` has it.
KINDS = {"compiled": "train/compiled", "eager": "train/eager"}
TOO = ("prune_opd.track.report",)  # what a run imports at its end


@uncollected()
def get_ready(kind: str) -> None:
    """Import what the launches need, in the order of a rank."""
    if kind in ("bare", "light"):
        if kind == "light":
            importlib.import_module("prune_opd.cli.main")
        return
    os.environ.update(rank_environment(os.environ))
    from prune_opd import platform
    from prune_opd.cli import ready

    platform.prepare()
    import torch

    names = ("Stream", "Event", "stream", "current_stream", "default_stream")
    before = [getattr(torch.cuda, name) for name in names]
    ready.get_ready(KINDS[kind])
    for module in (*TOO, "prune_opd.ranks.launcher", "psutil", "torch.distributed.run"):
        importlib.import_module(module)
    assert before == [getattr(torch.cuda, name) for name in names], "an import has replaced a name of torch.cuda"
    assert why_not() is None, why_not()
    keep_pages()


# ---------------------------------------------------------------------------------------------------- requests


def serve(connection: socket.socket, tidy: Callable[[], None] = lambda: None) -> None:
    """Answer requests until the other side is gone. tidy: what comes after each launch."""
    while True:
        data, files, _, _ = socket.recv_fds(connection, MESSAGE, 2)
        if not data:
            return
        if len(os.listdir("/proc/self/task")) > 1:
            raise RuntimeError(f"a fork would lose threads of the server: {threading.enumerate()}")
        pid = fork(functools.partial(launch, json.loads(data), *files), connection, new_group=True)
        for file in files:
            os.close(file)
        with suppress(ProcessLookupError, PermissionError):
            os.setpgid(pid, pid)  # here too: whoever comes first
        connection.send(json.dumps({"group": pid}).encode())
        _, status = os.waitpid(pid, 0)
        tidy()
        connection.send(json.dumps({"code": shell_code(os.waitstatus_to_exitcode(status))}).encode())


def launch(job: dict[str, Any], out: int, err: int) -> int:
    """In the process that leads the group: take over the launch's world, run it, return its exit code."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    os.chdir(job["folder"])
    os.umask(job["umask"])
    os.environ.clear()
    os.environ.update(job["environment"])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [path for path in paths if path and path not in sys.path]  # a new interpreter would have them
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # as `platform.prepare` does, which has run already
    return run_ranks(job["arguments"], job["ranks"]) if job["ranks"] else run_command(job["arguments"])


def run_ranks(arguments: Sequence[str], count: int) -> int:
    """A program on ranks as `start_ranks` has them, in seats that are forked from this process."""
    from prune_opd.ranks.launcher import run_agent

    where = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(count)]
    return run_agent([*where, *arguments], make_seats(count))


def _end_what_is_left() -> None:
    """End every descendant: the server is where orphans go (PR_SET_CHILD_SUBREAPER)."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGKILL)
            time.sleep(0.01)


def run_command(arguments: Sequence[str]) -> int:
    """The `prune-opd` command line, whose ranks are forked too: from this process, which stays as the server was."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def command() -> None:
        from tests.forked import stand_ins
        from tests.forked.client import Connection

        stand_ins.install(Connection(theirs), benchmarks=arguments[0] == "bench")
        from prune_opd.cli import main

        sys.argv = ["prune-opd", *arguments]
        main.main()

    pid = fork(lambda: run_fresh(command), ours)
    theirs.close()
    serve(ours)
    return shell_code(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def main(kind: str, file: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    end_with_parent(signal.SIGKILL)
    get_ready(kind)
    serve(socket.socket(fileno=file), _end_what_is_left)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
