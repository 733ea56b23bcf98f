"""Forked ranks are as good as new interpreters: they fail, hang, speak and begin like processes of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed.ranks import read_ranks, run_ranks
from tests.forked import client
from tests.forked.client import REPOSITORY
from tests.forked.command import run_command

# Each rank writes what it is to rank<r>.json in the folder that it is given.
STATE = """
import json, os, random, signal, sys, threading
from pathlib import Path
import numpy, torch
found = {
    "environment": dict(os.environ),
    "argv": sys.argv,
    "path": sys.path[0],
    "name": __name__,
    "folder": os.getcwd(),
    "umask": os.umask(0o22),
    "threads": [threading.active_count(), len(os.listdir("/proc/self/task")), torch.get_num_threads()],
    "drawn": [random.random(), float(numpy.random.rand()), torch.rand(1).item()],
    "handlers": [str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)],
    "stdin": os.readlink("/proc/self/fd/0"),
    "pid": os.getpid(),
    "default dtype": str(torch.get_default_dtype()),
    "gradients": torch.is_grad_enabled(),
    "leaked": getattr(torch, "leaked", None) or os.environ.get("LEAKED"),
}
torch.leaked = "yes"
os.environ["LEAKED"] = "yes"
os.chdir("/")
torch.set_default_dtype(torch.float64)
Path(sys.argv[1], f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
"""
SUM = """
import sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.tensor(float(dist.get_rank() + 1))
dist.all_reduce(value)
print(f"{dist.get_rank()} has {value.item():g}\\n", end="")  # in one piece, unbuffered too
dist.destroy_process_group()
"""


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


def state(folder: Path, ranks: int = 1, **options: Any) -> list[dict[str, Any]]:
    run_ranks(script(folder, STATE), ranks, [folder], **options)
    return read_ranks(folder, ranks)


# ---------------------------------------------------------------------------------------------------- as fresh


def test_ranks_meet_on_gloo_and_their_output_comes_back(tmp_path: Path) -> None:
    assert sorted(run_ranks(script(tmp_path, SUM), 3).split("\n")) == ["", "0 has 6", "1 has 6", "2 has 6"]


def test_a_rank_has_torchruns_variables_and_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "session")
    first, second = state(tmp_path, 2, env={"THEIRS": "launch"})
    for rank, found in enumerate((first, second)):
        variables = found["environment"]
        assert (variables["RANK"], variables["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (variables["WORLD_SIZE"], variables["LOCAL_WORLD_SIZE"]) == ("2", "2")
        assert (variables["MINE"], variables["THEIRS"], variables["OMP_NUM_THREADS"]) == ("session", "launch", "1")
    assert first["environment"]["MASTER_PORT"] == second["environment"]["MASTER_PORT"]
    again = state(tmp_path)[0]
    assert "THEIRS" not in again["environment"]
    assert again["environment"]["MASTER_PORT"] != first["environment"]["MASTER_PORT"]


def test_nothing_of_a_launch_is_in_the_next(tmp_path: Path) -> None:
    (first,), (second,) = state(tmp_path), state(tmp_path)
    for found in (first, second):
        assert found["leaked"] is None
        assert (found["default dtype"], found["gradients"]) == ("torch.float32", True)
        assert found["folder"] == str(REPOSITORY) and found["name"] == "__main__"
        assert found["argv"] == [str(tmp_path / "script.py"), str(tmp_path)] and found["path"] == str(tmp_path)
        assert found["threads"] == [1, 1, 1]
        assert found["stdin"] == "/dev/null"
    assert first["pid"] != second["pid"]


def test_generators_handlers_and_umask_are_those_of_a_new_interpreter(tmp_path: Path) -> None:
    """numpy and torch start anywhere in one; ranks that drew the same would hide what depends on that."""
    umask = os.umask(0o027)
    try:
        ranks = state(tmp_path, 2)
    finally:
        os.umask(umask)
    command = [sys.executable, script(tmp_path, STATE), tmp_path]
    subprocess.run(command, env=client.environment({"RANK": "7"}), check=True, stdin=subprocess.DEVNULL)
    fresh = json.loads((tmp_path / "rank7.json").read_text())
    for found in ranks:
        assert found["umask"] == 0o027
        assert found["handlers"] == fresh["handlers"]
        assert found["threads"][2] == fresh["threads"][2]
    draws = zip(*(found["drawn"] for found in (*ranks, fresh)), strict=True)
    assert all(len(set(values)) == 3 for values in draws)


def test_an_exit_handler_and_a_waiting_thread_have_their_turn(tmp_path: Path) -> None:
    text = """
import atexit, threading, time
atexit.register(print, "handler")
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
print("end")
"""
    assert run_ranks(script(tmp_path, text), 1) == "end\nthread\nhandler\n"


@pytest.mark.parametrize("memory", [False, True])
def test_c_libraries_tidy_up_where_there_is_shared_memory_and_nothing_of_the_parents_is_tidied_up(
    tmp_path: Path, memory: bool
) -> None:
    """As vLLM takes its shared memory away. What an import has left to its exit handlers is the server's."""
    text = f"""
import builtins, ctypes, mmap, os, weakref
print(len(weakref.finalize._registry))
heard = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: os.write(1, b"tidied up") and None)
ctypes.PyDLL(None).__cxa_atexit(heard, None, None)
with open("/dev/shm/prune-opd-test-{os.getpid()}", "w+b") as file:
    os.unlink(file.name)
    file.truncate(4096)
    builtins.kept = heard, mmap.mmap(file.fileno(), 4096) if {memory} else None
"""
    assert run_ranks(script(tmp_path, text), 1) == "0\n" + ("tidied up" if memory else "")


def test_launches_that_differ_in_what_is_read_at_import_have_servers_of_their_own(tmp_path: Path) -> None:
    keys = {
        client.server_key("eager", client.environment(env))
        for env in ({}, {"VLLM_CACHE_ROOT": "/x"}, {"A": "b"}, {"TORCHDYNAMO_DISABLE": "1"})
    }
    assert len(keys) == 1
    assert client.server_key("eager", client.environment({"TORCH_LOGS": "all"})) not in keys
    assert client.server_key("compiled", client.environment()) not in keys


# ---------------------------------------------------------------------------------------------------- failures


def ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("*.pid")]


WRITE_PID = """
import os, sys, time
from pathlib import Path
Path(sys.argv[1], f"{os.getpid()}.pid").write_text(str(os.getpid()))
rank = os.environ["RANK"]
print(f"here is rank {rank}\\n", end="", flush=True)
"""


def test_a_rank_that_raises_ends_the_others_and_its_words_come_back(tmp_path: Path) -> None:
    text = WRITE_PID + "if rank == '1': raise ValueError('the reason')\ntime.sleep(600)\n"
    with pytest.raises(AssertionError, match=r"script\.py on 2 ranks: exit code 1\n") as failure:
        run_ranks(script(tmp_path, text), 2, [tmp_path])
    assert "ValueError: the reason" in str(failure.value) and "here is rank 0" in str(failure.value)
    assert all(map(ended, pids(tmp_path)))


@pytest.mark.parametrize(
    ("ends", "code"), [("sys.exit(7)", 7), ("sys.exit('why')", 1), ("os.kill(os.getpid(), 9)", 137)]
)
def test_the_exit_code_is_that_of_the_rank_that_failed_first(tmp_path: Path, ends: str, code: int) -> None:
    text = WRITE_PID + f"if rank == '1': {ends}\ntime.sleep(600)\n"
    with pytest.raises(AssertionError, match=f"exit code {code}\n") as failure:
        run_ranks(script(tmp_path, text), 2, [tmp_path])
    if code == 137:
        assert "error: rank 1 was ended by SIGKILL" in str(failure.value)
    assert all(map(ended, pids(tmp_path)))


def test_a_rank_that_hears_no_signal_and_hangs_is_ended_when_the_time_is_up(tmp_path: Path) -> None:
    text = WRITE_PID + "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)\n"
    run_ranks(script(tmp_path, ""), 1)  # its server is there now
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"on 2 ranks: not done after 15 s\n") as failure:
        run_ranks(script(tmp_path, text), 2, [tmp_path], timeout=15)
    assert time.monotonic() - start < 15 + 27 and "here is rank 1" in str(failure.value)
    assert len(pids(tmp_path)) == 2 and all(map(ended, pids(tmp_path)))


def test_what_a_rank_leaves_behind_is_ended_in_a_session_of_its_own_too(tmp_path: Path) -> None:
    text = (
        WRITE_PID
        + """
import subprocess
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
Path(sys.argv[1], "child.pid").write_text(str(child.pid))
"""
    )
    run_ranks(script(tmp_path, text), 1, [tmp_path])
    assert len(pids(tmp_path)) == 2 and all(map(ended, pids(tmp_path)))


def test_an_interrupted_test_leaves_no_rank_behind(tmp_path: Path) -> None:
    def interrupt(number: int, frame: Any) -> None:
        if pids(tmp_path):
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 3, 0.2)
        with pytest.raises(KeyboardInterrupt):
            run_ranks(script(tmp_path, WRITE_PID + "time.sleep(600)"), 1, [tmp_path])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(pids(tmp_path)) == 1 and all(map(ended, pids(tmp_path)))
    assert run_ranks(script(tmp_path, "print('well')"), 1) == "well\n"


def test_a_killed_pytest_takes_server_and_ranks_with_it(tmp_path: Path) -> None:
    text = f"""
import sys
from tests.distributed.ranks import run_ranks
from tests.forked import client
run_ranks({str(script(tmp_path, WRITE_PID + "time.sleep(600)"))!r}, 2, [{str(tmp_path)!r}], timeout=500, kind="bare")
"""
    parent = subprocess.Popen([sys.executable, "-c", text], env=client.environment(), cwd=REPOSITORY)
    end = time.monotonic() + 300
    while len(pids(tmp_path)) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    (server,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    end = time.monotonic() + 20
    while not all(map(ended, [server.pid, *pids(tmp_path)])) and time.monotonic() < end:
        time.sleep(0.1)
    assert len(pids(tmp_path)) == 2 and all(map(ended, [server.pid, *pids(tmp_path)]))


# ---------------------------------------------------------------------------------------------------- commands


def test_a_command_has_its_own_folder_output_and_exit_code(tmp_path: Path) -> None:
    done = run_command("train", "no_such_recipe", folder=tmp_path)
    assert done.code == 2 and done.stdout == "" and re.match("error: .*no_such_recipe", done.stderr)
    done = run_command("check", "tiny_compatible", "steps=0", folder=tmp_path)
    assert done.code == 2 and "steps" in done.stderr


FORKS = """
import line_notes
import os
from prune_opd.ranks.forked import fork, run_fresh
from prune_opd.config import HorizonConfig
from prune_opd.method.horizon import make_controller
pid = fork(lambda: run_fresh(lambda: make_controller(HorizonConfig("full", max_len=5, min_len=1))))
os.chdir("/")
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_the_lines_that_forked_ranks_run_are_noted(tmp_path: Path) -> None:
    lines = REPOSITORY / "tests" / "lines"
    env = {**os.environ, "PRUNE_OPD_LINES": str(tmp_path), "PYTHONPATH": f"{lines}{os.pathsep}{REPOSITORY}"}
    for number in (1, 2):  # the second finds the code that the first has left
        subprocess.run([sys.executable, "-c", FORKS], check=True, timeout=120, env=env)
        assert {path.name.partition("-")[0] for path in (tmp_path / "code").iterdir()} > {"prune_opd.method.horizon"}
        seen = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
        parent, *rest, child = sorted(seen, key=lambda seen: sum(map(len, seen.values())))
        assert len(rest) == 2 * (number - 1) and all(seen in (parent, child) for seen in rest)
        assert set(parent) == set(child) and set(parent["method/horizon.py"]) < set(child["method/horizon.py"])
    report = subprocess.run([sys.executable, lines / "report.py", tmp_path], capture_output=True, text=True, check=True)
    share = re.fullmatch(r"line coverage: ([0-9.]+)%\n", report.stdout)
    assert share and 1 < float(share[1]) < 50
