"""One process at a time in a run directory: real processes that live, die, hang and come back."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from prune_opd.errors import UserError
from prune_opd.ranks import lease
from prune_opd.ranks.lease import FILE, Lease
from tests.forked.client import REPOSITORY

HOLDER = """
import sys, time
from pathlib import Path
from prune_opd.ranks import lease

lease.BEAT, lease.STALE = 0.05, 1.0
lease.Lease.__init__.__defaults__ = (0.05, 1.0)
with lease.held(Path(sys.argv[1])):
    print("held", flush=True)
    for line in sys.stdin:
        lease.end_if_lost()
        print("still held", flush=True)
"""


class Process:
    """A process that holds the lease and says on request whether it still does."""

    def __init__(self, run_dir: Path) -> None:
        command = [sys.executable, "-c", HOLDER, str(run_dir)]
        pipe = subprocess.PIPE
        self.child = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )
        self.first = self.line()

    def line(self) -> str:
        assert self.child.stdout is not None
        return self.child.stdout.readline().strip()

    def ask(self) -> str:
        assert self.child.stdin is not None
        self.child.stdin.write("?\n")
        self.child.stdin.flush()
        return self.line()

    def end(self, number: int = signal.SIGKILL) -> None:
        self.child.send_signal(number)
        self.child.wait(10)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Process]:
    process = Process(tmp_path / "run")
    yield process
    process.child.kill()
    process.child.communicate()


def quick(run_dir: Path, elsewhere: bool = False) -> Lease:
    """The lease of this process, as if on another host if `elsewhere`."""
    mine = Lease(run_dir, beat=0.05, stale=1.0)
    if elsewhere:
        mine.me = replace(mine.me, host="another", boot="another")
    return mine


def test_a_directory_in_use_is_refused_and_names_who_is_there(holder: Process, tmp_path: Path) -> None:
    assert holder.first == "held"
    for elsewhere in (False, True):  # on another host the sign of life is waited for
        with pytest.raises(
            UserError, match=rf"run is in use by process {holder.child.pid} on .*, there since .*: wait"
        ):
            quick(tmp_path / "run", elsewhere).take()
    assert holder.ask() == "still held"


def test_the_lease_of_a_killed_process_is_taken_at_once_on_its_host(holder: Process, tmp_path: Path) -> None:
    holder.end()
    mine = Lease(tmp_path / "run", stale=3600)
    started = time.monotonic()
    mine.take()
    assert time.monotonic() - started < 60
    mine.give_back()
    assert not (tmp_path / "run" / FILE).exists()


def test_elsewhere_it_is_taken_once_there_was_no_sign_of_life_for_long_enough(holder: Process, tmp_path: Path) -> None:
    holder.end()
    mine = quick(tmp_path / "run", elsewhere=True)
    started = time.monotonic()
    mine.take()
    assert time.monotonic() - started >= mine.stale
    mine.give_back()


def test_a_holder_that_hung_notices_that_it_was_taken_over_and_ends(holder: Process, tmp_path: Path) -> None:
    holder.child.send_signal(signal.SIGSTOP)
    mine = quick(tmp_path / "run", elsewhere=True)
    mine.take()
    holder.child.send_signal(signal.SIGCONT)
    said = holder.ask()
    assert said.startswith("error:") and "was taken over by process" in said and "on another" in said
    assert holder.child.wait(10) == 1
    mine.check()
    assert json.loads((tmp_path / "run" / FILE).read_text())["token"] == mine.me.token  # it took nothing away
    mine.give_back()


def test_a_file_that_is_not_to_be_understood_is_no_holder(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    mine = quick(tmp_path)
    mine.take()
    mine.check()
    mine.give_back()


def test_of_many_that_start_together_one_gets_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    pipe = subprocess.PIPE
    children = [
        subprocess.Popen(command, cwd=REPOSITORY, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)
        for _ in range(4)
    ]
    try:
        said = [child.stdout.readline().strip() for child in children if child.stdout is not None]
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert said.count("held") == 1, said


def test_only_rank_0_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with lease.held(tmp_path / "run"):
        assert not (tmp_path / "run").exists()
        lease.end_if_lost()
