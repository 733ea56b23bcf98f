"""A process that has imported torch, megatron-core and vLLM once, and forks what tests run from itself.

    pytest ── server (this module, one thread, nothing running in it)
                └─ launch: a fork that leads a process group and holds the ranks' store, as torchrun does
                     ├─ rank 0: a fork that runs the worker script, as fresh as a new interpreter
                     └─ rank 1 …

Importing all of it takes a rank 14 CPU seconds; a fork takes none. What a fork has that a new interpreter has not: the
server's hash seed, so all ranks iterate sets alike, and an end in which Python does not take its modules apart.

The kernel ends every process here with the one above it, and what a launch leaves behind is ended before the next:
nothing outlives its launch, and no launch pytest.

    python -m tests.forked.server KIND SOCKET

It answers requests on the socket, one at a time: JSON with two file descriptors (stdout and stderr of the launch) in,
the process group of the launch and then its exit code out.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import importlib
import json
import os
import random
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prune_opd.process import end_with_parent, rank_environment

PR_SET_CHILD_SUBREAPER = 36
MESSAGE = 1 << 20  # bytes
GRACE = 5.0  # seconds that the other ranks have after SIGTERM, when one has failed
# What a kind of launch finds imported. vLLM compiles what is imported while its switch is on (`platform.compiling`), so
# compiled engines find only what `RolloutEngine` imports before.
ENGINE = ("vllm", "vllm.v1.sample.sampler")
IMPORTS: dict[str, tuple[str, ...]] = {
    "bare": (),  # not even torch
    "compiled": ENGINE,
    "eager": (
        *ENGINE,
        "vllm.v1.engine.llm_engine",
        "vllm.v1.core.kv_cache_manager",
        "vllm.distributed.device_communicators.cpu_communicator",
        "vllm.distributed.elastic_ep.elastic_execute",
        "vllm.model_executor.models.qwen3",
        "vllm.plugins.lora_resolvers.filesystem_resolver",
        "compressed_tensors",
        "transformers.models.qwen3.modeling_qwen3",
    ),
}
# What making an engine imports beside them, if one has not been made: 150 modules, a CPU second a rank.
ENGINE_MAKING = (
    "vllm.entrypoints.llm",
    "vllm.plugins.lora_resolvers.hf_hub_resolver",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.model_executor.layers.quantization.compressed_tensors.utils",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.core.sched.scheduler",
)
WORKER = "vllm.v1.worker.cpu_worker"
REPLACES = "vllm.v1.worker.cpu.shm"  # imported by WORKER: replaces names of torch that no CPU has
OURS = (
    "prune_opd.run",
    "prune_opd.megatron.sync",
    "prune_opd.megatron.train_batch",
    "prune_opd.megatron.trainer",
    "prune_opd.megatron.teacher",
    "prune_opd.megatron.checkpoint",
    "prune_opd.eval.run",
    "prune_opd.track.report",
)


def get_ready(kind: str) -> None:
    """Import what the launches need, in the order of a rank."""
    if kind == "bare":
        return
    os.environ.update(rank_environment(os.environ))
    from prune_opd import platform

    platform.prepare()
    from prune_opd.rollout.engine import ENVIRONMENT

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch

    names = ("Stream", "Event", "stream", "current_stream", "default_stream")
    before = [getattr(torch.cuda, name) for name in names]
    for module in (*IMPORTS[kind], *OURS):
        importlib.import_module(module)
    if kind == "eager":
        get_worker_ready()
    assert before == [getattr(torch.cuda, name) for name in names], "an import has replaced a name of torch.cuda"
    gc.collect()
    gc.freeze()  # what is here now is not looked at again, and its pages stay shared


def get_worker_ready() -> None:
    """Import what making an engine imports, and let vLLM put its CPU kernels in Triton's places.

    A rank has torch's own names until it makes an engine: the two modules that replace them are forgotten here, and so
    imported again there. Putting the kernels in place walks through all modules, .9 CPU seconds a rank, and giving back
    what `gc.freeze` keeps costs as much when an engine is closed: here both are done once.
    """
    import torch
    from vllm.platforms import current_platform

    owners = (torch, torch.cuda, torch.accelerator, torch.Tensor)
    before = [dict(vars(owner)) for owner in owners]
    for module in (WORKER, *ENGINE_MAKING):
        importlib.import_module(module)
    current_platform.register_triton_kernel_overrides()
    type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)  # type: ignore[attr-defined]
    gc.unfreeze = lambda: None
    for owner, names in zip(owners, before, strict=True):
        for name, value in list(vars(owner).items()):
            if name in names and value is not names[name]:
                setattr(owner, name, names[name])
            elif name not in names and owner is torch.Tensor:
                delattr(owner, name)
    for forgotten in (WORKER, REPLACES):
        parent, _, name = forgotten.rpartition(".")
        delattr(sys.modules[parent], name)
        del sys.modules[forgotten]


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
        connection.send(json.dumps({"code": _shell_code(os.waitstatus_to_exitcode(status))}).encode())


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
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # as `platform.prepare` does, which has run already
    return run_ranks(job["arguments"], job["ranks"]) if job["ranks"] else run_command(job["arguments"])


def run_ranks(arguments: Sequence[str], count: int) -> int:
    """One process per rank, with torchrun's environment; the exit code of the one that failed first, or 0."""
    listener = socket.create_server(("127.0.0.1", 0))
    os.environ.update(
        LOCAL_WORLD_SIZE=str(count),
        WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(listener.getsockname()[1]),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
        TORCHELASTIC_MAX_RESTARTS="0",
        TORCHELASTIC_RUN_ID="forked",
        **{"GROUP_RANK": "0", "ROLE_RANK": "0", "GROUP_WORLD_SIZE": "1", "ROLE_WORLD_SIZE": str(count)},
    )
    ranks = {}
    for rank in range(count):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), ROLE_RANK=str(rank))
        ranks[fork(lambda: run_fresh(lambda: run_program(arguments)), listener)] = rank
    store = _store(listener)  # its thread comes after the forks; who connects before waits in the listener's queue
    code = _wait_for(ranks)
    del store
    return code


def _store(listener: socket.socket) -> Any:
    from torch.distributed import TCPStore

    port = listener.getsockname()[1]
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _wait_for(ranks: dict[int, int]) -> int:
    """Wait until all ranks have ended. The first that fails ends the others."""
    first, end = 0, None
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG if end else 0)
        if pid == 0:
            if end and time.monotonic() > end:
                for left in ranks:
                    os.kill(left, signal.SIGKILL)
                end = None
            time.sleep(0.02)
            continue
        rank, code = ranks.pop(pid, None), os.waitstatus_to_exitcode(status)
        if rank is None or code == 0 or first:
            continue
        first, end = _shell_code(code), time.monotonic() + GRACE
        if code < 0:
            print(f"error: rank {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
        for left in ranks:
            os.kill(left, signal.SIGTERM)
    return first


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


def _shell_code(code: int) -> int:
    return 128 - code if code < 0 else code


# ---------------------------------------------------------------------------------------------------- programs


def run_fresh(program: Callable[[], None]) -> int:
    """Run what would be a new interpreter's program, with its beginning and its end; the exit code."""
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
    # The end of a C program: libraries tidy up (vLLM takes its shared memory away, gloo complains of threads that are
    # left). Python's own end would only take modules apart. PyDLL keeps the lock, so that no other thread wakes up.
    ctypes.PyDLL(None).exit(code)
    return code


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
    return _shell_code(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def main(kind: str, file: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    end_with_parent(signal.SIGKILL)
    get_ready(kind)
    serve(socket.socket(fileno=file), _end_what_is_left)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
