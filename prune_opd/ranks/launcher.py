"""Start N ranks on this node with torchrun, pass signals on to them, and leave none behind.

    prune-opd ── start_ranks() ──▶ agent (torchrun in a session of its own: `python -m prune_opd.ranks.launcher`)
                                     └─ N × python -m prune_opd.cli.worker …

SIGTERM, SIGUSR1 and Ctrl-C go through the agent to the ranks, which take the time they need (a training run saves and
ends with `REQUEUE_EXIT_CODE`). A second signal kills at once. If a process is killed outright, the kernel ends those
below it (PR_SET_PDEATHSIG). `prune-opd` itself imports no torch here.

On several nodes, start `python -m prune_opd.ranks.launcher` instead of torchrun, with torchrun's arguments.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import FrameType

from prune_opd.errors import REQUEUE_EXIT_CODE
from prune_opd.process import end_with_parent, rank_environment

ASKING = (signal.SIGTERM, signal.SIGUSR1)  # they ask a run to save and end
SIGNALS = (signal.SIGINT, *ASKING)
# Signals within so many seconds count as one: we, torchrun and a cluster's scheduler may all pass the same one on.
ONE_WISH = 1.0


def start_ranks(args: list[str], nproc: int, env: Mapping[str, str], asked: str = "") -> int:
    """Run a Python program once per rank and return its exit code.

    Args:
        args: as for torchrun: a script, or `-m` and a module, followed by the program's arguments.
        nproc: ranks on this node.
        env: the environment of the ranks, usually `os.environ`.
        asked: what to say when a first signal has come.

    Returns:
        0; or the exit code of the rank that failed first; or 128 + the number of the signal that ended the run; or
        `REQUEUE_EXIT_CODE` if a signal made the ranks save and stop.

    Output goes to this process's stdout and stderr. Call it from the main thread: it handles `SIGNALS`.
    """
    settings = rank_environment(env)
    # fmt: off
    command = [
        sys.executable, "-m", "prune_opd.ranks.launcher",
        "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(nproc), *args,
    ]
    # fmt: on
    received: list[int] = []
    first = 0.0

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if received and time.monotonic() - first < ONE_WISH:
            return
        received.append(number)
        first = first or time.monotonic()
        if agent is None or agent.poll() is not None:
            return
        if len(received) == 1:
            if asked:
                print(f"\n{asked}", file=sys.stderr, flush=True)
            os.killpg(agent.pid, _as_asking(number))
        else:  # it would break torchrun's clean-up: kill torchrun then, and the kernel ends the ranks
            os.killpg(agent.pid, signal.SIGKILL)

    agent: subprocess.Popen[bytes] | None = None
    previous = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        agent = subprocess.Popen(command, env=settings, start_new_session=True, preexec_fn=_ends_with(os.getpid()))
        if received:
            os.killpg(agent.pid, _as_asking(received[0]))
        code = agent.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received and code not in (0, REQUEUE_EXIT_CODE):
        return 128 + received[0]
    if code < 0:
        print(f"error: torchrun was ended by {signal.Signals(-code).name}, and the ranks with it", file=sys.stderr)
    return _shell_code(code)


def _as_asking(number: int) -> int:
    """The signal that the ranks get: Ctrl-C asks for the same as SIGTERM."""
    return signal.SIGTERM if number == signal.SIGINT else number


def _ends_with(parent: int) -> Callable[[], None]:
    """What the agent does between fork and exec: ask the kernel for a signal when `parent` dies, or end if it has."""

    def prepare() -> None:
        end_with_parent(signal.SIGTERM)  # it ends its ranks in order
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)

    return prepare


def _shell_code(code: int) -> int:
    """A process ended by signal n has the return code -n in Python and 128 + n in a shell."""
    return 128 - code if code < 0 else code


def _agent(argv: list[str]) -> int:
    """torchrun without its own messages: a rank that failed has printed one, for a rank that was killed we do.

    We handle `ASKING` too: torchrun would give the ranks only half a minute to save.
    """
    import psutil
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def hand_on(number: int, frame: FrameType | None) -> None:
        if not (ranks := psutil.Process().children()):
            sys.exit(128 + number)  # no rank has started yet
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    logging.disable(logging.ERROR)  # in this process: what ends it comes as an exception
    for number in ASKING:
        signal.signal(number, hand_on)
    try:
        run.run(run.parse_args(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *argv]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
            print(f"error: rank {rank} was ended by {name}{hint}", file=sys.stderr)
        return _shell_code(failure.exitcode)
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(_agent(sys.argv[1:]))
