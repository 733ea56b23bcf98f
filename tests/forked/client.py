"""Ask the fork server (`tests/forked/server.py`) for launches. It starts with the first one and ends with pytest."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from prune_opd.process import rank_environment

REPOSITORY = Path(__file__).resolve().parents[2]
# Variables that something reads while it is imported: launches that differ in them need servers of their own. The
# others, VLLM_CACHE_ROOT among them, are read when they are needed.
READ_AT_IMPORT = ("OMP_", "MKL_", "KMP_", "PYTHON", "TORCH", "VLLM_", "CUDA_", "HF_", "TRANSFORMERS_", "LD_")
READ_LATER = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "PYTHONUNBUFFERED")
STARTING = 300.0  # seconds that the imports may take on a busy machine
ENDING = 30.0


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a process that a test starts: this one's, one thread a rank, and this checkout's modules."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", str(REPOSITORY))]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        # prune_opd and tests.* are this checkout's, whatever the directory pytest was started in.
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *paths]),
        **(more or {}),
    }


class TimeIsUpError(Exception):
    """The launch was not done in time; it has been ended."""


class ServerEndedError(Exception):
    """The server is gone, and the launch with it."""


class Connection:
    """One side of the socket to a process that forks launches; one launch at a time."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.lost = False  # whether the two sides no longer know what the other is at

    def launch(
        self,
        arguments: Sequence[str],
        ranks: int,
        environment: Mapping[str, str],
        files: tuple[int, int],
        *,
        folder: Path | None = None,
        timeout: float | None = None,
    ) -> int:
        """Run a Python program once per rank, or the command line (0 ranks), to its end; the exit code.

        environment: the whole one. files: descriptors of stdout and stderr. folder: where it runs, else where we are.
        `TimeIsUpError` after `timeout` seconds. However it ends, nothing of it is left.
        """
        umask = os.umask(0o077)
        os.umask(umask)
        job = {
            "arguments": list(arguments),
            "ranks": ranks,
            "environment": dict(environment),
            "folder": str(folder or Path.cwd()),
            "umask": umask,
        }
        group: int | None = None
        self.lost = True
        try:
            socket.send_fds(self._connection, [json.dumps(job).encode()], files)
            group = self._answer(STARTING)["group"]
            code = self._answer(timeout)["code"]
            self.lost = False
            return code
        except BaseException as reason:  # time, or a test that was interrupted
            if group is not None:
                with suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
                self._answer(ENDING)
                self.lost = False
            if isinstance(reason, TimeoutError):
                raise TimeIsUpError from None
            raise

    def _answer(self, timeout: float | None) -> dict[str, int]:
        self._connection.settimeout(timeout)
        data = self._connection.recv(1 << 16)
        if not data:
            raise ServerEndedError
        answer: dict[str, int] = json.loads(data)
        return answer


class ForkServer(Connection):
    """A server process of a kind, in the environment that its launches have."""

    def __init__(self, kind: str, environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        super().__init__(ours)
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the server
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked.server", kind, str(theirs.fileno())],
            cwd=REPOSITORY,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=self._words,
            stderr=self._words,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()

    def close(self, seconds: float = 0.0) -> None:
        """Let it end by itself for some time; then at once, and with it all that it has forked."""
        self._connection.close()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def words(self) -> str:
        """What the server itself has printed: nothing, as long as it is well."""
        self._words.seek(0)
        return self._words.read().decode(errors="replace")


@atexit.register
def _end_servers() -> None:
    """Their CPU seconds are then those of pytest's children."""
    for server in _servers.values():
        server.close(ENDING)


Key = tuple[str, frozenset[tuple[str, str]]]
_servers: dict[Key, ForkServer] = {}


def server_key(kind: str, environment: Mapping[str, str]) -> Key:
    """Launches of one key share a server: all that was read while it imported is the same for them."""
    full = rank_environment(environment)  # as in the server
    read = {n: v for n, v in full.items() if n.startswith(READ_AT_IMPORT) and n not in READ_LATER}
    return kind, frozenset(read.items())


@dataclass(frozen=True)
class Done:
    code: int | None  # the exit code; None: it was not done in time and has been ended
    stdout: str  # with stderr, if they were not asked for apart
    stderr: str


def launch(
    kind: str,
    arguments: Sequence[str | Path],
    ranks: int,
    environment: Mapping[str, str],
    *,
    folder: Path | None = None,
    timeout: float | None = None,
    apart: bool = False,
) -> Done:
    """`Connection.launch` with the server of this kind and environment, which starts if there is none yet.

    apart: stdout and stderr each for itself. AssertionError if the server has ended.
    """
    key = server_key(kind, environment)
    if key not in _servers or _servers[key].process.poll() is not None:
        _servers[key] = ForkServer(kind, environment)
    server = _servers[key]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        files = (out.fileno(), (err if apart else out).fileno())
        try:
            code = server.launch([*map(str, arguments)], ranks, environment, files, folder=folder, timeout=timeout)
        except TimeIsUpError:
            code = None
        except (ServerEndedError, OSError) as reason:
            raise AssertionError(f"the fork server has ended ({reason!r}): {server.words()}") from None
        finally:
            if server.lost:  # the next launch gets a new one
                _servers.pop(key).close()
        return Done(code, text_of(out), text_of(err))


def text_of(file: IO[bytes]) -> str:
    """The whole content."""
    file.seek(0)
    return file.read().decode(errors="replace")
