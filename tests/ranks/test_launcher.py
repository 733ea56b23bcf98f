"""`start_ranks` with small programs: exit codes, the environment, signals, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from prune_opd.errors import REQUEUE_EXIT_CODE
from prune_opd.ranks import forked
from prune_opd.ranks.launcher import ONE_WISH, start_ranks
from prune_opd.ranks.node import torchrun_arguments

LAUNCH = """
import os, sys
from prune_opd.ranks.launcher import start_ranks
ready = tuple(sys.argv[1].split())
sys.exit(start_ranks(sys.argv[2:], 2, os.environ, ready=ready))
"""
# Nothing is imported before the ranks are forked: a fork is a fork, and megatron takes 14 CPU seconds.
FORKED = ("tests.ranks.nothing", "eval/eager")
FORKED_TO_SAVE = ("tests.ranks.nothing", "train/eager")
STARTS = pytest.mark.parametrize("ready", [(), FORKED], ids=["new", "forked"])
# Writes its process id to a file for the test, then waits. With "stubborn", SIGTERM and SIGINT do not end it.
WAITS = """
import os, signal, sys, time
from pathlib import Path
from prune_opd.errors import REQUEUE_EXIT_CODE
from prune_opd.process import end_with_parent
end_with_parent(signal.SIGKILL)
if sys.argv[2] == "stubborn":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: Path(sys.argv[1], "told" + os.environ["RANK"]).touch())
if sys.argv[2] == "saves":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(REQUEUE_EXIT_CODE))
part = Path(sys.argv[1], "part" + os.environ["RANK"])
part.write_text(str(os.getpid()))
part.rename(Path(sys.argv[1], "rank" + os.environ["RANK"]))
end = time.monotonic() + 300
while time.monotonic() < end:
    time.sleep(0.1)
"""


def program(folder: Path, text: str) -> str:
    path = folder / "program.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(condition: object, seconds: float = 120.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


class Launched:
    """A launcher in a process of its own with two ranks that wait."""

    def __init__(self, folder: Path, manner: str, ready: tuple[str, ...]) -> None:
        args = [sys.executable, "-c", LAUNCH, " ".join(ready), program(folder, WAITS), str(folder), manner]
        self.process = subprocess.Popen(args, stderr=subprocess.PIPE, text=True)
        files = [folder / "rank0", folder / "rank1"]
        wait_until(lambda: all(path.is_file() for path in files))
        self.ranks = [int(path.read_text(encoding="utf-8")) for path in files]
        self.agent = int(Path(f"/proc/{self.ranks[0]}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])

    def all_gone(self) -> bool:
        return not any(map(alive, [self.process.pid, self.agent, *self.ranks]))

    def clean_up(self) -> None:
        for pid in [self.process.pid, self.agent, *self.ranks]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def launched(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Launched]:
    launched = Launched(tmp_path, *getattr(request, "param", ("gentle", FORKED)))
    yield launched
    launched.clean_up()


@STARTS
def test_ranks_see_their_rank_and_a_quiet_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ready: tuple[str, ...]
) -> None:
    names = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE", "MINE")
    text = "import os, sys\nfrom pathlib import Path\n"
    text += f"Path(sys.argv[1], os.environ['RANK']).write_text(' '.join(os.environ[n] for n in {names!r}))"
    env = {name: value for name, value in os.environ.items() if name not in names}
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert start_ranks([program(tmp_path, text), str(tmp_path)], 2, env | {"MINE": "yes"}, ready=ready) == 0
    assert [(tmp_path / rank).read_text(encoding="utf-8") for rank in "01"] == ["0 2 1 1 yes", "1 2 1 1 yes"]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before, "the caller's come back"


@STARTS
def test_settings_of_the_user_win_and_the_exit_code_of_the_failing_rank_passes_through_without_noise(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], ready: tuple[str, ...]
) -> None:
    text = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(int(os.environ['OMP_NUM_THREADS']))\n"
    text += "time.sleep(60)"
    began = time.monotonic()
    assert start_ranks([program(tmp_path, text)], 2, os.environ | {"OMP_NUM_THREADS": "7"}, ready=ready) == 7
    assert time.monotonic() - began < 40  # the other rank was not waited for
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("killed", "ready"), [("0", FORKED), ("1", ()), ("1", FORKED)])
def test_a_killed_rank_is_reported_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], killed: str, ready: tuple[str, ...]
) -> None:
    text = f"import os, signal, time\nif os.environ['RANK'] == '{killed}': os.kill(os.getpid(), signal.SIGKILL)\n"
    text += "time.sleep(60)"
    assert start_ranks([program(tmp_path, text)], 2, os.environ, ready=ready) == 128 + signal.SIGKILL
    assert capfd.readouterr().err == f"error: rank {killed} was ended by SIGKILL, perhaps for want of memory\n"


@pytest.mark.parametrize(
    ("launched", "number"),
    [
        (("gentle", FORKED), signal.SIGTERM),
        (("gentle", FORKED), signal.SIGINT),
        (("gentle", FORKED), signal.SIGUSR1),
        (("gentle", ()), signal.SIGTERM),
    ],
    indirect=["launched"],
)
def test_a_signal_ends_every_rank(launched: Launched, number: signal.Signals) -> None:
    launched.process.send_signal(number)
    assert launched.process.wait(timeout=40) == 128 + number
    wait_until(launched.all_gone)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])  # Ctrl-C asks for the same
@pytest.mark.parametrize("launched", [("saves", FORKED)], indirect=True)
def test_ranks_that_saved_on_a_signal_say_that_the_run_goes_on(launched: Launched, number: signal.Signals) -> None:
    launched.process.send_signal(number)
    assert launched.process.wait(timeout=40) == REQUEUE_EXIT_CODE
    wait_until(launched.all_gone)


@pytest.mark.parametrize("launched", [("stubborn", FORKED), ("stubborn", ())], indirect=True)
def test_a_second_signal_does_not_wait_for_a_rank_that_takes_its_time(launched: Launched, tmp_path: Path) -> None:
    launched.process.send_signal(signal.SIGTERM)
    wait_until(lambda: (tmp_path / "told0").exists() and (tmp_path / "told1").exists())
    assert launched.process.poll() is None  # the ranks have time to save
    time.sleep(ONE_WISH)
    launched.process.send_signal(signal.SIGTERM)
    assert launched.process.wait(timeout=10) == 128 + signal.SIGTERM
    wait_until(launched.all_gone)


@pytest.mark.parametrize("victim", ["launcher", "agent"])
def test_a_killed_process_takes_those_below_it_along(launched: Launched, victim: str) -> None:
    os.kill(launched.process.pid if victim == "launcher" else launched.agent, signal.SIGKILL)
    launched.process.wait(timeout=40)
    wait_until(launched.all_gone)


class Waiting:
    """A launcher whose agent is about to import; `go` lets it."""

    def __init__(self, folder: Path, text: str, ready: tuple[str, ...]) -> None:
        self.folder = folder
        args = [sys.executable, "-c", LAUNCH, " ".join(ready), program(folder, text), str(folder)]
        env = os.environ | {"READY_WAITS": str(folder)}
        self.process = subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env=env)
        wait_until((folder / "importing").exists)

    def go(self) -> str:
        (self.folder / "go").touch()
        return self.process.communicate(timeout=100)[0]


SAVES_IF_ASKED = r"""
import sys, time
from prune_opd.errors import REQUEUE_EXIT_CODE
from prune_opd.ranks.signals import Interruption
interruption = Interruption()
time.sleep(0.5)
sys.stdout.write("asked\n" if interruption._since else "not asked\n")  # one write: ranks share a pipe
sys.exit(REQUEUE_EXIT_CODE if interruption._since else 0)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ranks_that_save_hear_of_a_signal_that_came_during_the_imports(tmp_path: Path, number: signal.Signals) -> None:
    """A scheduler's SIGUSR1 must not end a run for good because it came early."""
    waiting = Waiting(tmp_path, SAVES_IF_ASKED, FORKED_TO_SAVE)
    waiting.process.send_signal(number)
    time.sleep(0.5)
    assert waiting.go().split("\n")[:2] == ["asked", "asked"]
    assert waiting.process.returncode == REQUEUE_EXIT_CODE


def test_ranks_that_save_nothing_do_not_begin_after_a_signal(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path, SAVES_IF_ASKED, FORKED)
    waiting.process.send_signal(signal.SIGTERM)
    assert waiting.go() == ""
    assert waiting.process.returncode == 128 + signal.SIGTERM


def test_a_process_killed_during_the_imports_leaves_nothing_behind(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path, SAVES_IF_ASKED, FORKED_TO_SAVE)
    (agent,) = psutil.Process(waiting.process.pid).children()
    waiting.process.kill()
    waiting.process.wait()
    (tmp_path / "go").touch()
    wait_until(lambda: not alive(agent.pid))
    assert waiting.process.communicate()[0] == ""


WHO = """
import os, sys, time
from pathlib import Path
parent = Path(f"/proc/{os.getppid()}/cmdline").read_text()
print("child of the agent" if "prune_opd.ranks.launcher" in parent else parent, flush=True)
print("new" if "-u" in Path("/proc/self/cmdline").read_text().split("\\0")[1:3] and
      "prune_opd.ranks.launcher" not in Path("/proc/self/cmdline").read_text() else "fork", flush=True)
print(os.getsid(0) == os.getpid(), file=sys.stderr, flush=True)
"""


@pytest.mark.parametrize(
    ("does", "note"),
    [("", ""), ("thread", "note: each rank imports for itself: an import has started threads"), ("fail", "")],
)
def test_ranks_are_new_processes_where_a_fork_would_not_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], does: str, note: str
) -> None:
    assert start_ranks([program(tmp_path, WHO)], 1, os.environ | {"READY_DOES": does}, ready=FORKED) == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == ["child of the agent", "new" if does else "fork"]
    assert note in err and err.endswith("True\n") and len(err.splitlines()) == 1 + bool(note)


def test_a_forked_rank_has_torchruns_log_files_and_starts_anew_as_a_new_process(tmp_path: Path) -> None:
    text = """
import os, sys
print("rank", os.environ["RANK"], "attempt", os.environ["TORCHELASTIC_RESTART_COUNT"])
print("to stderr", file=sys.stderr)
sys.exit(os.environ["TORCHELASTIC_RESTART_COUNT"] == "0")
"""
    argv = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2", "--max-restarts", "1"]
    argv += ["--redirects", "3", "--log-dir", str(tmp_path / "logs"), program(tmp_path, text)]
    command = [sys.executable, "-u", "-m", "prune_opd.ranks.launcher", "--ready", *FORKED, *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    said = {
        (path.parent.name, path.parent.parent.name): path.read_text(encoding="utf-8")
        for path in (tmp_path / "logs").rglob("stdout.log")
    }
    assert said == {
        (rank, f"attempt_{attempt}"): f"rank {rank} attempt {attempt}\n" for rank in "01" for attempt in (0, 1)
    }
    assert {path.read_text(encoding="utf-8") for path in (tmp_path / "logs").rglob("stderr.log")} == {"to stderr\n"}


SUM = r"""
import os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.tensor(float(dist.get_rank() + 1))
dist.all_reduce(value)
names = ("RANK", "LOCAL_RANK", "GROUP_RANK")
sys.stdout.write(" ".join([*(os.environ[name] for name in names), f"{value.item()}\n"]))  # one write: a shared pipe
dist.destroy_process_group()
"""


def test_forked_ranks_of_two_nodes_meet(tmp_path: Path) -> None:
    """As `prune_opd/ranks/node.py` starts them under Slurm, both nodes on this machine."""
    nodes = []
    for node in "01":
        slurm = {"SLURM_NNODES": "2", "SLURM_NODEID": node, "SLURM_JOB_ID": str(os.getpid())}
        argv = [*torchrun_arguments(2, slurm), program(tmp_path, SUM)]
        command = [sys.executable, "-u", "-m", "prune_opd.ranks.launcher", "--ready", *FORKED, *argv]
        nodes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    assert [sorted(text.splitlines()) for text in said] == [["0 0 0 10.0", "1 1 0 10.0"], ["2 0 1 10.0", "3 1 1 10.0"]]


def test_a_process_that_has_initialized_cuda_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def __init__(self, answer: int) -> None:
            self.cuCtxGetCurrent = lambda context: answer

    monkeypatch.setattr(forked.ctypes, "CDLL", lambda name: Driver(forked.CUDA_NOT_INITIALIZED))
    assert not forked.cuda_is_initialized()
    monkeypatch.setattr(forked.ctypes, "CDLL", lambda name: Driver(0))
    assert forked.cuda_is_initialized()


def test_the_launcher_loads_no_room_but_its_own() -> None:
    """Plan, check, track and data would cost every start of ranks their imports, and torch seconds."""
    text = "import sys, prune_opd.ranks.launcher; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout.split()
    rooms = {name.split(".")[1] for name in loaded if name.startswith("prune_opd.")}
    assert rooms == {"errors", "process", "ranks"}
    assert not {"torch", "megatron", "vllm", "transformers", "pydantic", "rich"} & set(loaded)
