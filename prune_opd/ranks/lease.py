"""One process at a time in a run directory: a file that says who is there, and a sign of life in it.

A job that is queued again while the old one still runs, or a command that is typed twice, would write into the same
metrics and checkpoints. Rank 0 takes the lease before anything is written, and renews it every few seconds. No file
locks: they do not hold on every network file system. A rename does, and what is opened anew is read anew.

    nobody there                        taken
    the holder's process has ended      taken: on the same host at once, else after `STALE` seconds without a sign
    the holder lives                    refused, with its host, process and age
    the holder hung, and another came   it notices before it writes again, and ends
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from prune_opd.errors import UserError

FILE = "lease.json"
BEAT, STALE = 10.0, 60.0  # seconds


@dataclass(frozen=True)
class Holder:
    """Who has a run directory. born: when its process began, in the kernel's ticks; beat: signs of life so far."""

    token: str
    host: str
    boot: str  # of the kernel, and of the space of its process numbers
    pid: int
    born: str
    since: str
    beat: int = 0

    @property
    def ended(self) -> bool:
        """Whether its process is known to have ended: only its own host can tell."""
        return self.boot == _boot() and _born(self.pid) != self.born

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, there since {self.since}"


class Lease:
    """The lease of a run directory, held from `take` to `give_back`."""

    def __init__(self, run_dir: Path, beat: float = BEAT, stale: float = STALE) -> None:
        self.path, self.beat, self.stale = run_dir / FILE, beat, stale
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.me = Holder(uuid.uuid4().hex, socket.gethostname(), _boot(), os.getpid(), _born(os.getpid()), since)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Take the lease. Raises `UserError` if another process that lives has it. May wait for `stale` seconds."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._write_new():
            if (holder := self.read()) is not None:
                self._refuse_if_alive(holder)
            self._write()
            time.sleep(min(1.0, self.beat))  # another may have done so at the same moment: the later one has it
        self.check()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def read(self) -> Holder | None:
        """Who has it now; None if nobody, or if the file is not to be understood."""
        try:
            return Holder(**json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def check(self) -> None:
        """Raise `UserError` if another process has taken it: this one must not write any more."""
        holder = self.read()
        if holder is not None and holder.token != self.me.token:
            raise UserError(
                f"{self.path.parent} was taken over by {holder}, because this process gave no sign of life for "
                f"{self.stale:g} s: it ends here, and has written nothing since"
            )

    def give_back(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        holder = self.read()
        if holder is not None and holder.token == self.me.token:
            self.path.unlink(missing_ok=True)

    def _refuse_if_alive(self, holder: Holder) -> None:
        """Return once the holder is known to be gone: its process has ended, or it gives no sign of life."""
        alive = UserError(
            f"--run-dir {self.path.parent} is in use by {holder}: wait for it or end it; if it is no training run any "
            f"more, remove {self.path}"
        )
        if holder.boot == self.me.boot:
            if holder.ended:
                return
            raise alive
        deadline = time.monotonic() + self.stale
        while time.monotonic() < deadline:
            time.sleep(min(self.beat, self.stale) / 4)
            now = self.read()
            if now is None:
                return
            if now != holder:
                raise alive

    def _write_new(self) -> bool:
        """Create the file with its content, unless there is one."""
        temporary = self._temporary()
        try:
            os.link(temporary, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            if self.path.exists():
                return False
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _write(self) -> None:
        os.replace(self._temporary(), self.path)

    def _temporary(self) -> Path:
        temporary = self.path.with_name(f".{FILE}.{self.me.token}")
        temporary.write_text(json.dumps(asdict(self.me)) + "\n", encoding="utf-8")
        return temporary

    def _renew(self) -> None:
        while not self._over.wait(self.beat):
            with suppress(OSError):  # a full disk, or a network that is away for a moment
                holder = self.read()
                if holder is not None and holder.token != self.me.token:
                    return  # `check` says so
                self.me = replace(self.me, beat=self.me.beat + 1)
                self._write()


_held: Lease | None = None


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Rank 0 holds the run directory's lease inside; `end_if_lost` looks whether it still does."""
    global _held
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    _held = Lease(run_dir)
    _held.take()
    try:
        yield
    finally:
        _held.give_back()
        _held = None


def end_if_lost() -> None:
    """End this process at once, without another write, if the lease of its run directory went to another process."""
    try:
        if _held is not None:
            _held.check()
    except UserError as lost:
        print(f"error: {lost}", file=sys.stderr, flush=True)
        os._exit(lost.exit_code)


def _boot() -> str:
    """Processes of one number are the same process only under the same kernel and in the same process space."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return f"{socket.gethostname()} {uuid.getnode()}"


def _born(pid: int) -> str:
    """When a process began; "" if there is none."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    return ""
