"""Ranks that are forks of a process which has imported what they need, once for all ranks of a node.

torchrun's agent (`ranks/launcher.py`) imports, and forks a seat for each rank while it still is a single thread. A seat
waits. When torchrun would start a new interpreter, a seat gets its command, environment and files instead, and runs
the program as a new interpreter would. For torchrun it looks like one: a child in a session of its own.

What a fork has that a new interpreter has not: the hash seed of all ranks of its node, and an end in which Python does
not take its modules apart.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from prune_opd.process import end_with_parent

CUDA_NOT_INITIALIZED = 3  # the driver's CUDA_ERROR_NOT_INITIALIZED
POLL = 0.05  # seconds


def why_not() -> str | None:
    """Why this process must not be forked any more; None: it may."""
    threads = os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else ["?", "?"]
    if len(threads) > 1:
        return "an import has started threads, which a fork would lose"
    if cuda_is_initialized():
        return "an import has initialized CUDA, which a fork could not use"
    return None


def cuda_is_initialized() -> bool:
    """Whether anything in this process has initialized CUDA's driver. Does not initialize it."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    context = ctypes.c_void_p()
    return int(driver.cuCtxGetCurrent(ctypes.byref(context))) != CUDA_NOT_INITIALIZED


def keep_pages() -> None:
    """Call it before the forks: what is here now is not looked at again by the garbage collector, and stays shared."""
    gc.collect()
    gc.freeze()


def fork(run: Callable[[], int], *closes: socket.socket, new_group: bool = False) -> int:
    """Run a function in a child, which ends with this process and never comes back; its process id."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        end_with_parent(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        if new_group:
            os.setpgid(0, 0)
        for each in closes:
            each.close()
        code = run()
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Seat:
    """A fork that waits for a rank's program. Whoever starts it sees a `subprocess.Popen`."""

    def __init__(self, others: Sequence[Seat] = (), answering: Sequence[signal.Signals] = ()) -> None:
        """others: the seats before this one. answering: signals that are blocked here, but not in the program."""
        ours, theirs = socket.socketpair()
        self._socket: socket.socket = ours
        self.pid = fork(functools.partial(_sit, theirs, answering), ours, *(seat._socket for seat in others))
        self.taken = False
        self.returncode: int | None = None
        theirs.close()

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], files: Mapping[int, IO[Any]]) -> None:
        """Run a Python program: a script, or -m and a module, and its arguments. files: by descriptor, 1 or 2."""
        self.taken = True
        job = {"arguments": list(arguments), "environment": dict(environment), "files": list(files)}
        with suppress(BrokenPipeError, ConnectionResetError):  # it has been killed: its exit code says so
            socket.send_fds(self._socket, [b"."], [file.fileno() for file in files.values()])
            self._socket.sendall(json.dumps(job).encode())
        self._socket.close()

    def poll(self) -> int | None:
        """The exit code, or minus the signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """As `subprocess.Popen.wait`. Raises `subprocess.TimeoutExpired`."""
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout or 0)
            time.sleep(POLL)
        return code


def make_seats(count: int, answering: Sequence[signal.Signals] = ()) -> list[Seat]:
    """`answering`: as in `Seat`."""
    seats: list[Seat] = []
    for _ in range(count):
        seats.append(Seat(seats, answering))
    return seats


def seat_ranks(seats: Sequence[Seat]) -> None:
    """From now on torchrun in this process gives each rank a seat, once: a rank that starts anew is a new process."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    handler: Any = SubprocessHandler
    new_process = handler._popen

    def popen(self: Any, args: tuple[str, ...], env: dict[str, str]) -> Any:
        seat = seats[self.local_rank_id] if self.local_rank_id < len(seats) else None
        if seat is None or seat.taken or args[:2] != (sys.executable, "-u"):  # under numactl, or another interpreter
            return new_process(self, args, env)
        seat.start(args[2:], env, {n: file for n, file in ((1, self._stdout), (2, self._stderr)) if file})
        return seat

    handler._popen = popen


def _sit(theirs: socket.socket, answering: Sequence[signal.Signals]) -> int:
    """In a seat: wait for the program, and run it. Returns its exit code; 0 if none came."""
    os.setsid()
    data, files, _, _ = socket.recv_fds(theirs, 1, 2)
    if not data:
        return 0
    job = json.loads(b"".join(iter(functools.partial(theirs.recv, 1 << 16), b"")))
    theirs.close()
    for target, file in zip(job["files"], files, strict=True):
        os.dup2(file, target)
        os.close(file)
    os.environ.clear()
    os.environ.update(job["environment"])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, answering)
    return run_fresh(lambda: run_program(job["arguments"]))


def run_fresh(program: Callable[[], None]) -> int:
    """Run what would be a new interpreter's program, with its beginning and its end; the exit code."""
    registry: Any = weakref.finalize._registry  # type: ignore[attr-defined]
    for finalizer in list(registry):  # what the parent will tidy up; torch's libraries would cost .06 CPU seconds
        finalizer.detach()
    random.seed()
    if torch := sys.modules.get("torch"):
        import numpy

        numpy.random.seed()
        torch.default_generator.seed()
    code = 0
    try:
        program()
    except SystemExit as reason:
        code = _exit_code(reason)
    except BaseException:
        traceback.print_exc()
        code = 1
    shutdown: Any = threading._shutdown  # type: ignore[attr-defined]
    shutdown()  # threads that are no daemons are waited for, and then come the exit handlers
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # Python's own end would only take modules apart. PyDLL keeps the lock, so that no other thread wakes up.
    libc = ctypes.PyDLL(None)
    if _must_tidy_up():
        libc.exit(code)
    libc.fflush(None)
    return code


def _must_tidy_up() -> bool:
    """Whether this process needs the end of a C program: vLLM then takes its shared memory away, CUDA its contexts.

    Without that, torch would only forget its operators one by one, a quarter of a CPU second.
    """
    return "/dev/shm/" in Path("/proc/self/maps").read_text() or cuda_is_initialized()


def _exit_code(reason: SystemExit) -> int:
    if reason.code is None or isinstance(reason.code, int):
        return reason.code or 0
    print(reason.code, file=sys.stderr)
    return 1


def run_program(arguments: Sequence[str]) -> None:
    """What Python does with these arguments: a script, or -m and a module, and the program's own."""
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, str(Path(arguments[0]).parent.absolute()))
        runpy.run_path(arguments[0], run_name="__main__")
