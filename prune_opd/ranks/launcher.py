"""Start N ranks on this node with torchrun, pass signals on to them, and leave none behind.

    prune-opd ── start_ranks() ──▶ agent (torchrun in a session of its own: `python -m prune_opd.ranks.launcher`)
                                     └─ N × python -m prune_opd.cli.worker …, forks of the agent (`ranks/forked.py`)

SIGTERM, SIGUSR1 and Ctrl-C go through the agent to the ranks, which take the time they need (a training run saves and
ends with `REQUEUE_EXIT_CODE`). A second signal kills at once. If a process is killed outright, the kernel ends those
below it (PR_SET_PDEATHSIG). `prune-opd` itself imports no torch here.

On several nodes, start `python -u -m prune_opd.ranks.launcher` instead of torchrun, with torchrun's arguments. Before
them may come `--ready MODULE KIND`: the agent calls that module's `get_ready(KIND)`, and the ranks are forked from it.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from types import FrameType

from prune_opd.errors import REQUEUE_EXIT_CODE
from prune_opd.process import end_with_parent, rank_environment
from prune_opd.ranks import forked

ASKING = (signal.SIGTERM, signal.SIGUSR1)  # they ask a run to save and end
SIGNALS = (signal.SIGINT, *ASKING)
# Signals within so many seconds count as one: we, torchrun and a cluster's scheduler may all pass the same one on.
ONE_WISH = 1.0
READY = "--ready"  # the agent's own argument
SAVES = "train"  # the kind of ranks that answer ASKING themselves, as soon as they can (`ranks/signals.py`)


def start_ranks(
    args: list[str], nproc: int, env: Mapping[str, str], asked: str = "", ready: tuple[str, ...] = ()
) -> int:
    """Run a Python program once per rank and return its exit code.

    Args:
        args: as for torchrun: a script, or `-m` and a module, followed by the program's arguments.
        nproc: ranks on this node.
        env: the environment of the ranks, usually `os.environ`.
        asked: what to say when a first signal has come.
        ready: a module and a kind of ranks (`cli/ready.py`), for what is imported before the ranks are forked; empty:
            they are new interpreters.

    Returns:
        0; or the exit code of the rank that failed first; or 128 + the number of the signal that ended the run; or
        `REQUEUE_EXIT_CODE` if a signal made the ranks save and stop.

    Output goes to this process's stdout and stderr. Call it from the main thread: it handles `SIGNALS`.
    """
    settings = rank_environment(env)
    # fmt: off
    command = [
        sys.executable, "-u", "-m", "prune_opd.ranks.launcher", *([READY, *ready] if ready else []),
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
    return shell_code(code)


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


def shell_code(code: int) -> int:
    """A process ended by signal n has the return code -n in Python and 128 + n in a shell."""
    return 128 - code if code < 0 else code


def run_agent(argv: list[str], seats: Sequence[forked.Seat] = (), saves: bool = False) -> int:
    """torchrun without its own messages: a rank that failed has printed one, for a rank that was killed we do.

    We handle `ASKING` too: torchrun would give the ranks only half a minute to save.

    Args:
        argv: torchrun's arguments.
        seats: where the ranks of this node run; none: in new interpreters.
        saves: `ASKING` is blocked, and the ranks unblock it: what came before they began, they hear then.
    """
    import psutil
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    def hand_on(number: int, frame: FrameType | None) -> None:
        ranks = psutil.Process().children()
        if not ranks or (seats and not saves and not any(seat.taken for seat in seats)):
            sys.exit(128 + number)  # no rank has started yet
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    forked.seat_ranks(seats)
    logging.disable(logging.ERROR)  # in this process: what ends it comes as an exception
    # It looks through the files of all modules for the name of its own caller, which is logged: 0.7 CPU seconds.
    dynamic_rendezvous.get_method_name = lambda depth=2: "rendezvous"
    for number in ASKING:
        signal.signal(number, hand_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
    try:
        run.run(run.parse_args(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *argv]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
            print(f"error: rank {rank} was ended by {name}{hint}", file=sys.stderr)
        return shell_code(failure.exitcode)
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _seats(argv: list[str], module: str, kind: str, answering: Sequence[signal.Signals]) -> list[forked.Seat]:
    """A seat for each rank of this node, or none where a fork would not do: the ranks then import for themselves."""
    count = argv[argv.index("--nproc-per-node") + 1] if "--nproc-per-node" in argv else ""
    if not count.isdecimal() or "--numa-binding" in argv:  # torchrun counts GPUs, or starts ranks under numactl
        return []
    try:
        import_module(module).get_ready(kind)
    except Exception:  # the ranks will meet it too, and say so
        return []
    if reason := forked.why_not():
        print(f"note: each rank imports for itself: {reason}", file=sys.stderr)
        return []
    forked.keep_pages()
    return forked.make_seats(int(count), answering)


def main(argv: list[str]) -> int:
    if argv[:1] != [READY]:
        return run_agent(argv)
    _, module, kind, *argv = argv
    parent = os.getppid()
    saves = kind.partition("/")[0] == SAVES
    if saves:
        signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    seats = _seats(argv, module, kind, () if saves else ASKING)
    if os.getppid() != parent:  # killed meanwhile; its SIGTERM to us may be blocked
        return 128 + signal.SIGTERM
    return run_agent(argv, seats, saves and bool(seats))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
