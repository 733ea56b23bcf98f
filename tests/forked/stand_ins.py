"""What takes the place of torchrun and of new interpreters inside a forked `prune-opd` command."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO, Any

from prune_opd.process import rank_environment
from tests.forked.client import Connection, TimeIsUpError, text_of


def install(connection: Connection, benchmarks: bool) -> None:
    """Call it before the command line's modules take what is replaced."""
    from prune_opd.ranks import launcher

    def start_ranks(
        args: list[str], nproc: int, env: Mapping[str, str], asked: str = "", ready: tuple[str, ...] = ()
    ) -> int:
        sys.stdout.flush()
        return connection.launch(args, nproc, rank_environment(env), (1, 2))

    launcher.start_ranks = start_ranks
    if benchmarks:
        from benchmarks import common
        from benchmarks.strategies import runs

        common.subprocess = runs.subprocess = Launches(connection)  # type: ignore[assignment]


class Launches:
    """Stands for the module `subprocess` in the benchmarks: their Python programs are launches."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)

    def run(
        self, command: list[str], *, env: Mapping[str, str], timeout: float | None = None, **kwargs: Any
    ) -> subprocess.CompletedProcess[str]:
        """`subprocess.run` with text, both outputs captured."""
        assert kwargs == {"capture_output": True, "text": True}
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            try:
                code = self._launch(command, env, (out.fileno(), err.fileno()), timeout)
            except TimeIsUpError:
                raise subprocess.TimeoutExpired(command, timeout or 0) from None
            return subprocess.CompletedProcess(command, code, text_of(out), text_of(err))

    def Popen(self, command: list[str], *, env: Mapping[str, str], stdout: IO[bytes], **kwargs: Any) -> Ended:
        """`subprocess.Popen` with stderr in stdout, for one at a time: it has ended when this returns."""
        assert kwargs.keys() <= {"stderr", "preexec_fn"}  # a core of its own does not matter
        return Ended(self._launch(command, env, (stdout.fileno(), stdout.fileno()), None))

    def _launch(
        self, command: Sequence[str], env: Mapping[str, str], files: tuple[int, int], timeout: float | None
    ) -> int:
        ranks, arguments = 1, list(command[1:])
        if "--nproc-per-node" in command:  # under torchrun
            at = arguments.index("--nproc-per-node")
            ranks, arguments = int(arguments[at + 1]), arguments[at + 2 :]
        assert env.get("OMP_NUM_THREADS") == os.environ["OMP_NUM_THREADS"], "the server has its threads already"
        code = self._connection.launch(arguments, ranks, env, files, timeout=timeout)
        return code if code <= 128 else 128 - code


class Ended:
    """A process that is over."""

    def __init__(self, code: int) -> None:
        self.returncode = code

    def poll(self) -> int:
        return self.returncode

    wait = poll

    def kill(self) -> None:
        pass
