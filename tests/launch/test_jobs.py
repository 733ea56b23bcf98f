"""Submissions become jobs; a node becomes ranks. No NeMo-Run."""

import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed import run

from launch.cluster import Cluster
from launch.jobs import Job, Submission, plan_jobs, sweep_lines, sweep_points, title_of
from prune_opd.errors import REQUEUE_EXIT_CODE, ConfigError, UserError
from prune_opd.ranks.node import ENDED_BY_ANOTHER, PORTS, binding_arguments, torchrun_arguments

CLUSTER = Cluster(kind="slurm", account="a", nodes=2, ranks_per_node=4, run_root="/r")


def test_a_sweep_is_the_product_of_its_axes() -> None:
    assert sweep_points(("a=1,2", "b=x,y")) == [("a=1", "b=x"), ("a=1", "b=y"), ("a=2", "b=x"), ("a=2", "b=y")]
    assert sweep_points(()) == [()]


def test_each_run_of_a_sweep_has_its_own_directory_and_jobs() -> None:
    jobs = plan_jobs(Submission("tiny", sweep=("horizon.strategy=full,prune",), evaluate="ledger"), CLUSTER)
    assert [job.name for job in jobs] == ["train-0", "evaluate-0", "train-1", "evaluate-1"]
    assert [job.after for job in jobs] == [None, "train-0", None, "train-1"]
    assert "/r/tiny-0" in jobs[0].command and "/r/tiny-1/hf" in jobs[3].command
    assert "horizon.strategy=prune" in jobs[2].command
    assert [job.nodes for job in jobs] == [2, 1, 2, 1]


@pytest.mark.parametrize("axis", ["a", "=1", "a=1,"])
def test_a_bad_sweep_is_refused(axis: str) -> None:
    with pytest.raises(ConfigError, match="is not a sweep"):
        sweep_points((axis,))


def test_a_sweep_into_one_directory_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave out --run-dir"):
        plan_jobs(Submission("tiny", sweep=("a=1,2",), run_dir="/one"), CLUSTER)


def test_a_sweep_of_recipes_trains_each_of_them_with_the_same_overrides() -> None:
    submission = Submission(
        "tiny", overrides=("steps=2",), sweep=("recipe=tiny,/x/other.py", "seed=1,2"), evaluate="ledger"
    )
    trainings = [job for job in plan_jobs(submission, CLUSTER) if job.name.startswith("train")]
    group = "track.group=tiny"  # a sweep is one group in wandb
    assert [job.command[job.command.index("--run-dir") + 1 :] for job in trainings] == [
        ("/r/tiny-0", "tiny", "steps=2", "seed=1", group),
        ("/r/tiny-1", "tiny", "steps=2", "seed=2", group),
        ("/r/tiny-2", "/x/other.py", "steps=2", "seed=1", group),
        ("/r/tiny-3", "/x/other.py", "steps=2", "seed=2", group),
    ]
    assert [job.label for job in trainings] == ["tiny", "tiny", "other.tiny-2", "other.tiny-3"]
    assert sweep_lines(submission)[2] == "train-2: /x/other.py seed=1"
    assert sweep_lines(Submission("tiny")) == []


def test_two_axes_of_recipes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"recipe=… stands there twice"):
        plan_jobs(Submission("tiny", sweep=("recipe=a,b", "recipe=c")), CLUSTER)


def test_every_word_of_a_script_arrives_as_it_was(tmp_path: Path) -> None:
    words = ["a b", "$HOME", "`id`", "it's", '"quoted"', "x;y", "*", "ä\\n"]
    show = "import sys; print(sys.argv[1:])"
    folder = tmp_path / "with space & more"
    folder.mkdir()
    cluster = Cluster(kind="slurm", account="a", workdir=str(folder), python=sys.executable)
    script = Job("train", ("-c", show, *words), 1).script(cluster)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(words)
    assert subprocess.run(["bash", "-n", "-c", script], check=False).returncode == 0
    assert shlex.quote(str(folder)) in script


def test_an_own_recipe_is_kept_as_it_was_and_found_beside_the_script(tmp_path: Path) -> None:
    recipe = tmp_path / "my run.py"
    recipe.write_text("text", encoding="utf-8")
    (job,) = plan_jobs(Submission(str(recipe), overrides=("name=a b",)), replace(CLUSTER, python="echo"))
    recipe.unlink()
    assert job.files == (("my run.py", "text"),)
    for folder in ("scripts", "code"):
        (tmp_path / "a job" / folder).mkdir(parents=True)
    script = tmp_path / "a job" / "scripts" / "train.sh"
    script.write_text(job.script(replace(CLUSTER, python="echo", workdir="/")), encoding="utf-8")
    said = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=True).stdout
    assert said.endswith(f"{tmp_path}/a job/code/my run.py name=a b\n")


@pytest.mark.parametrize(
    ("recipe", "title"), [("/x/my run.py", "my-run"), ("runs/x/config.yaml", "x"), ("tiny", "tiny"), ("runs/x/", "x")]
)
def test_a_job_is_named_after_its_recipe(recipe: str, title: str) -> None:
    assert title_of(recipe) == title


def test_torchrun_finds_the_other_nodes_from_slurm() -> None:
    env = {"SLURM_NNODES": "4", "SLURM_NODEID": "3", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "SLURM_JOB_ID": "77"}
    arguments = dict(zip(*[iter(torchrun_arguments(8, env))] * 2, strict=True))
    assert arguments == {
        "--nnodes": "4",
        "--node-rank": "3",
        "--nproc-per-node": "8",
        "--master-addr": "10.0.0.1",
        "--master-port": str(PORTS[77]),
    }
    assert torchrun_arguments(8, env | {"MASTER_ADDR": "h", "MASTER_PORT": "5"})[-3:] == ["h", "--master-port", "5"]


NODE_WITH_A_FAKE_CHILD = """
import sys
from prune_opd.ranks.node import Supervisor
supervisor = Supervisor()
print("ready", flush=True)
code = supervisor.run([sys.executable, "-c", sys.argv[1]], {})
sys.exit(code)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_goes_on_to_the_child_whose_code_comes_back(name: str) -> None:
    child = (
        "import signal, sys, time\n"
        f"signal.signal(signal.{name}, lambda *_: sys.exit({REQUEUE_EXIT_CODE}))\n"
        "print('up', flush=True)\ntime.sleep(30)"
    )
    import signal

    node = subprocess.Popen([sys.executable, "-c", NODE_WITH_A_FAKE_CHILD, child], stdout=subprocess.PIPE, text=True)
    assert node.stdout is not None
    assert [node.stdout.readline(), node.stdout.readline()] == ["ready\n", "up\n"]
    node.send_signal(getattr(signal, name))
    assert node.wait(20) == REQUEUE_EXIT_CODE
    node.stdout.close()


def test_a_killed_child_gives_a_shells_code() -> None:
    code = "import os; os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", NODE_WITH_A_FAKE_CHILD, code], capture_output=True, check=False)
    assert done.returncode == 137


LEAVING_NODE = """
import sys
from pathlib import Path
from prune_opd.ranks.node import Supervisor
supervisor = Supervisor()
env = {"SLURM_NNODES": "2", "SLURM_NODEID": sys.argv[2], "SLURM_JOB_ID": "7"}
print("up", flush=True)
sys.exit(supervisor.leave_together(Path(sys.argv[1]), env))
"""


def leaving(folder: Path, node: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LEAVING_NODE, str(folder), node]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.stdout.close()
    return process


def test_nodes_that_have_saved_leave_together(tmp_path: Path) -> None:
    first = leaving(tmp_path, "0")
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(1)  # the other one is still saving
    assert leaving(tmp_path, "1").wait(20) == first.wait(20) == REQUEUE_EXIT_CODE


def test_a_node_that_waits_ends_when_another_has_failed(tmp_path: Path) -> None:
    node = leaving(tmp_path, "0")
    while not list(tmp_path.glob(".leaving/*/0")):
        time.sleep(0.05)
    node.terminate()
    assert node.wait(20) == ENDED_BY_ANOTHER


def test_numa_binding_reaches_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = replace(CLUSTER, gpus_per_node=8, numa_binding="node")
    (job,) = plan_jobs(Submission("tiny"), bound)
    assert job.command[job.command.index("--numa-binding") + 1] == "node"
    (tmp_path / "numactl").write_text("", encoding="utf-8")
    (tmp_path / "numactl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.parse_args([*binding_arguments("node"), "script.py"]).numa_binding == "node"  # a name that torchrun has
    assert binding_arguments(None) == []
    (tmp_path / "numactl").unlink()
    with pytest.raises(UserError, match="numactl"):
        binding_arguments("node")


def test_numa_binding_without_gpus_is_refused() -> None:
    with pytest.raises(ConfigError, match="set gpus_per_node"):
        replace(CLUSTER, numa_binding="node")
