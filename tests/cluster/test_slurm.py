"""Jobs through a real Slurm of two nodes on this machine: NeMo-Run submits, torchrun trains on 2 nodes × 1 rank."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from prune_opd.errors import REQUEUE_EXIT_CODE
from tests.cluster.throwaway import Slurm, Sshd, wait_for, why_not

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCH_PYTHON = REPOSITORY / ".venv-launch" / "bin" / "python"
PLANTED = "planted-5f1d7c"
ODD = "a 'b' $HOME `id` \"c\"; d"
TINY = ("rollout.prompts=4", "horizon.max_len=64", "horizon.init_len=64", "evaluation.problems=0", "name=tiny")

ROOTFS = REPOSITORY / "build" / "rootfs-cpu"
NOBODY = 65534


def why_no_rootfs() -> str | None:
    """The reason why there is no file system of our image as it is now; None if there is one."""
    fresh = subprocess.run(["bash", str(REPOSITORY / "scripts" / "build_rootfs.sh"), "--is-fresh"], check=False)
    if fresh.returncode == 0:
        return None
    state = "was built from other files than these" if ROOTFS.is_dir() else "is not there"
    return f"{ROOTFS.relative_to(REPOSITORY)} {state} (make rootfs-cpu builds it in some minutes, as root)"


reason = why_not() or (None if LAUNCH_PYTHON.is_file() else "make setup-launch has not run")
if reason:
    print(f"\ntests/cluster is skipped: {reason}", file=sys.__stderr__)
no_rootfs = None if reason else why_no_rootfs()
if no_rootfs:
    print(f"\ntests/cluster: training in our own image is skipped: {no_rootfs}", file=sys.__stderr__)
pytestmark = [pytest.mark.skipif(reason is not None, reason=str(reason)), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="prune-opd-slurm-", dir="/tmp"))
    folder.chmod(0o755)  # pytest's own folders are closed to daemons
    cluster = Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


class Site:
    """A cluster file and NeMo-Run's home beside the throwaway Slurm."""

    def __init__(self, slurm: Slurm) -> None:
        self.slurm = slurm
        self.home = slurm.folder / "nemorun"
        self.runs = slurm.folder / "runs"
        self.runs.mkdir(exist_ok=True)

    def cluster(self, name: str, **changes: object) -> str:
        settings: dict[str, object] = {
            "kind": "slurm",
            "account": "somebody",
            "partition": "batch",
            "nodes": 2,
            "ranks_per_node": 1,
            "gpus_per_node": 1,
            "time": "00:10:00",
            "signal_before_end": 60,
            "workdir": str(REPOSITORY),
            "python": sys.executable,
            "run_root": str(self.runs),
            "environment": {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""},
        }
        path = self.slurm.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings | changes), encoding="utf-8")
        return str(path)

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "PYTHONPATH")}
        return kept | self.slurm.environment | {"NEMORUN_HOME": str(self.home)} | more

    def submitting_as(self, user: int) -> Path:
        """A folder for the front of PATH, whose sbatch has root's jobs run as another user."""
        programs = self.slurm.folder / f"as-{user}"
        programs.mkdir()
        sbatch = programs / "sbatch"
        sbatch.write_text(f'#!/bin/sh\nexec {shutil.which("sbatch")} --uid={user} --gid={user} "$@"\n')
        sbatch.chmod(0o755)
        return programs

    def launch(
        self, *words: str, timeout: float = 200, umask: int = -1, **env: str
    ) -> subprocess.CompletedProcess[str]:
        command = [str(LAUNCH_PYTHON), "-m", "launch", *words]
        return subprocess.run(
            command, cwd=REPOSITORY, env=self.environment(**env), capture_output=True, text=True, timeout=timeout,
            check=False, stdin=subprocess.DEVNULL, umask=umask,
        )  # fmt: skip

    def recipe(self, name: str, text: str) -> str:
        path = self.slurm.folder / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        return str(path)

    def records(self, run: str) -> list[dict[str, Any]]:
        """Of the training steps in a run's metrics."""
        lines = (self.runs / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [record for record in map(json.loads, lines) if "loss" in record]

    def steps(self, run: str) -> list[int]:
        return [record["step"] for record in self.records(run)]


@pytest.fixture(scope="module")
def site(slurm: Slurm) -> Site:
    return Site(slurm)


@pytest.fixture(scope="module")
def trained(site: Site) -> subprocess.CompletedProcess[str]:
    """Two steps on two nodes, then the evaluation and the export that depend on them."""
    return site.launch(
        "submit", "tiny_compatible", *TINY, "steps=2", "--cluster", site.cluster("plain"),
        "--evaluate", "ledger", "-k", "1", "--problems", "4", "--export", str(site.slurm.folder / "exported"),
    )  # fmt: skip


def test_tiny_recipe_trains_on_two_nodes_and_is_evaluated_afterwards(
    site: Site, trained: subprocess.CompletedProcess[str]
) -> None:
    logs = site.launch("logs", "tiny_compatible").stdout
    assert trained.returncode == 0, trained.stdout + trained.stderr + logs
    assert site.steps("tiny_compatible") == [1, 2]
    assert "train: job" in trained.stdout and "evaluate: job" in trained.stdout
    first = logs.index("prune-opd.tiny_compatible.train")
    assert logs.index("\nok\n", first) < logs.index("2 ranks" if "2 ranks" in logs else "step", first)
    assert re.search(r"accuracy|avg@1", logs)
    found = site.launch("status", "tiny_compatible")
    assert found.returncode == 0 and found.stdout.count("COMPLETED") == 3


@pytest.mark.parametrize("name", ["evaluate", "export"])
def test_what_follows_waited_for_the_training(site: Site, trained: subprocess.CompletedProcess[str], name: str) -> None:
    train, then = (re.search(rf"{job}: job (\d+)", trained.stdout)[1] for job in ("train", name))  # type: ignore[index]
    end = site.slurm.output("sacct", "-X", "-n", "-P", "-j", train, "-o", "End")
    start = site.slurm.output("sacct", "-X", "-n", "-P", "-j", then, "-o", "Start")
    assert end <= start


def test_the_export_is_the_trained_student_as_transformers_loads_it(
    site: Site, trained: subprocess.CompletedProcess[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported, of_the_run = site.slurm.folder / "exported", site.runs / "tiny_compatible" / "hf"
    model, same = (AutoModelForCausalLM.from_pretrained(folder) for folder in (exported, of_the_run))
    assert AutoTokenizer.from_pretrained(exported).vocab_size == model.config.vocab_size
    weights, expected = model.state_dict(), same.state_dict()
    assert weights.keys() == expected.keys()
    assert all(weights[name].equal(expected[name]) for name in expected)  # the one that training left in its own folder


def test_a_sweep_runs_every_value_and_fails_with_the_one_that_failed(site: Site) -> None:
    recipe = site.recipe("values", "from prune_opd.recipes.tiny_compatible import tiny_compatible as values\n")
    cluster = site.cluster("values", nodes=1)
    sweep = ("--sweep", "horizon.strategy=topd,popd", "--sweep", "data.source=ledger,missing.jsonl")
    done = site.launch("submit", recipe, *TINY, "steps=1", *sweep, "--cluster", cluster)
    states = {name: re.findall(rf"{name}: job \d+ (\w+)", done.stdout)[-1] for name in map("train-{}".format, range(4))}
    logs = site.launch("logs", "values").stdout
    assert list(states.values()) == ["COMPLETED", "FAILED"] * 2, done.stdout + done.stderr + logs
    assert (
        done.returncode == 1 and logs.count("data.source = 'missing.jsonl': there is no such file") == 2
    )  # preflight's
    assert f"train-2: {recipe} horizon.strategy=popd data.source=ledger" in done.stdout
    windows = [record["horizon"] for run in ("values-0", "values-2") for record in site.records(run)]
    assert windows == [16, 64]  # a quarter of 64 tokens; the first window


def test_a_sweep_over_recipes(site: Site) -> None:
    other = site.recipe(
        "other",
        """import dataclasses
from prune_opd.recipes.tiny_compatible import tiny_compatible
def other():
    return dataclasses.replace(tiny_compatible(), optimizer=dataclasses.replace(tiny_compatible().optimizer, lr=2e-4))
""",
    )
    cluster = site.cluster("recipes", nodes=1)
    sweep = ("--sweep", f"recipe=tiny_compatible,{other}")
    done = site.launch(
        "submit",
        site.recipe("several", ""),
        *TINY,
        "optimizer.warmup_steps=0",
        "optimizer.schedule=constant",
        "steps=1",
        *sweep,
        "--cluster",
        cluster,
    )
    assert done.returncode == 0, done.stdout + done.stderr + site.launch("logs", "several").stdout
    assert f"train-1: {other}" in done.stdout
    assert [record["lr"] for run in ("several-0", "several-1") for record in site.records(run)] == [3e-4, 2e-4]


def test_a_failed_rank_fails_the_job_and_make(site: Site) -> None:
    secret = site.slurm.folder / "secret"
    secret.write_text(f"{PLANTED}-file\n")
    # An own recipe travels in the job's script: it must not have the secrets itself.
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in (PLANTED, f"{PLANTED}-file")]
    recipe = site.recipe(
        "failing",
        f"""import hashlib, os
from prune_opd.recipes.tiny_compatible import tiny_compatible as failing
if os.environ.get("RANK") == "1":
    keys = [hashlib.sha256(os.environ[name].encode()).hexdigest() for name in ("ENV_KEY", "FILE_KEY")]
    right = (os.environ["ODD"], os.environ["odd_case"], *keys) == ({ODD!r}, "x y", {digests[0]!r}, {digests[1]!r})
    os._exit(43 if right else 44)
""",
    )
    cluster = site.cluster(
        "failing",
        environment={"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "ODD": ODD, "odd_case": "x y"},
        secrets={"ENV_KEY": "environment", "FILE_KEY": str(secret)},
    )
    make = ["make", "launch", f"RECIPE={recipe}", f"CLUSTER={cluster}", "ARGS=--evaluate ledger"]
    done = subprocess.run(
        make, cwd=REPOSITORY, env=site.environment(ENV_KEY=PLANTED), capture_output=True, text=True, timeout=200,
        check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    logs = site.launch("logs", "failing").stdout
    assert done.returncode != 0
    assert re.search(r"train: job \d+ FAILED, exit code [1-9]", done.stdout), done.stdout + done.stderr + logs
    assert "task 1: Exited with exit code 43" in logs  # 44 if a variable or a secret had not arrived as it was
    # What waited for it is not left in the queue for ever.
    assert re.search(r"evaluate: job \d+ CANCELLED", done.stdout)
    assert site.launch("status", "failing").returncode != 0


def test_no_secret_is_in_any_file(site: Site) -> None:
    assert any(site.home.glob("experiments/failing/*/train/log-*"))  # the job above had both secrets
    places = [site.home, site.slurm.folder / "state", site.slurm.folder / "log", site.runs]
    found = subprocess.run(["grep", "-rl", PLANTED, *map(str, places)], capture_output=True, text=True, check=False)
    written = [name for name in found.stdout.splitlines() if "/state/" not in name]  # Slurm keeps a job's environment
    assert not written


def test_a_signal_saves_queues_again_and_goes_on(site: Site) -> None:
    recipe = site.recipe("again", "from prune_opd.recipes.tiny_compatible import tiny_compatible as again\n")
    submitted = site.launch(
        "submit", recipe, *TINY, "steps=20", "checkpoint.every=100", "--cluster", site.cluster("again"), "--detach"
    )
    assert submitted.returncode == 0, submitted.stderr
    job = site.slurm.output("squeue", "-h", "-o", "%i")
    wait_for(lambda: (site.runs / "again" / "metrics.jsonl").is_file() and site.steps("again"), 240, "the first step")
    site.slurm.command("scancel", "--signal=USR1", job)
    wait_for(lambda: site.slurm.state(job) in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED"), 400, "the end")
    logs = site.launch("logs", "again").stdout
    words = "\n".join(path.read_text() for path in site.home.glob("experiments/again/*/train/sbatch_*"))
    assert site.slurm.state(job) == "COMPLETED", logs + words
    assert site.slurm.output("sacct", "-D", "-X", "-n", "-P", "-j", job, "-o", "State").count("\n") == 1
    assert site.steps("again") == list(range(1, 21))  # nothing lost, nothing twice
    assert f"exited with code {REQUEUE_EXIT_CODE}" in logs and "queueing job" in logs
    assert f"_{job}_0.out" in logs and f"_{job}_1.out" in logs  # both attempts
    assert "restarted 1 ×" in site.launch("status", "again").stdout


def test_a_job_that_slurm_refuses_is_a_failure(site: Site) -> None:
    cluster = site.cluster("refused", partition="nowhere")
    done = site.launch("submit", "tiny_compatible", "--cluster", cluster, timeout=60)
    assert done.returncode != 0, done.stdout + done.stderr


def test_cancel(site: Site) -> None:
    recipe = site.recipe(
        "sleeping",
        "import os, time\nfrom prune_opd.recipes.tiny_compatible import tiny_compatible as sleeping\n"
        "if 'SLURM_JOB_ID' in os.environ:\n    time.sleep(300)\n",
    )
    assert site.launch("submit", recipe, "--cluster", site.cluster("cancel"), "--detach").returncode == 0
    job = site.slurm.output("squeue", "-h", "-o", "%i")
    wait_for(lambda: site.slurm.state(job) == "RUNNING", 30, "a running job")
    assert site.launch("cancel", "sleeping").returncode == 0
    wait_for(lambda: site.slurm.state(job) == "CANCELLED", 30, "a cancelled job")
    assert site.launch("status", "sleeping").returncode != 0


def test_container_flags_through_pyxis_options(site: Site, trained: subprocess.CompletedProcess[str]) -> None:
    """The flags, mounts and the script, in a root file system that shares this machine's programs."""
    root = site.slurm.folder / "rootfs"
    (root / "tmp").mkdir(parents=True)
    for link in ("bin", "lib", "lib64", "sbin"):
        (root / link).symlink_to(f"usr/{link}")
    shared = {
        "/usr",
        "/etc",
        "/opt",
        str(REPOSITORY),
        str(Path(sys.prefix)),
        str(Path(sys.base_prefix)),
        str(Path.home()),
    }
    # The run directory has another name in there: only a task that is really inside finds the finished run.
    mounts = [f"{path}:{path}:ro" for path in sorted(shared)] + [f"{site.runs}:/inside"]
    cluster = site.cluster("container", nodes=1, container_image=str(root), container_mounts=mounts)
    finished = ("--run-dir", "/inside/tiny_compatible")
    recipe = site.recipe("boxed", "from prune_opd.recipes.tiny_compatible import tiny_compatible as boxed\n")
    done = site.launch("submit", recipe, *TINY, "steps=2", *finished, "--cluster", cluster)
    logs = site.launch("logs", "boxed").stdout
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert "is finished" in logs


@pytest.mark.skipif(no_rootfs is not None, reason=str(no_rootfs))
def test_training_in_a_root_file_system_from_our_own_dockerfile(site: Site) -> None:
    """Two nodes, each task in the image's file system as a user without rights; the image's Python and prune_opd."""
    shared = site.runs / "boxed"
    shared.mkdir()
    (shared / "boxed.py").write_text(
        """import json, os, sys
from prune_opd.recipes.tiny_compatible import tiny_compatible as boxed
import prune_opd, prune_opd.recipes
mounts = [line.split()[4] for line in open("/proc/self/mountinfo")]
own = [place for place in mounts if place.split("/")[1] not in ("", "proc", "sys", "dev", "nemo_run")]
print("INSIDE", json.dumps([sys.prefix, prune_opd.__file__, prune_opd.recipes.__file__, os.getuid(), own]))
"""
    )
    os.chown(shared, NOBODY, NOBODY)
    cluster = site.cluster(
        "boxed",
        workdir=None,
        python="/opt/prune-opd/venv/bin/python",
        container_image=str(ROOTFS),
        container_mounts=[f"{shared}:/workspace/runs"],
        run_root="/workspace/runs",
        environment={
            "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "",
            "HOME": "/workspace/runs",
        },
    )  # fmt: skip
    programs = site.submitting_as(NOBODY)
    recipe = "/workspace/runs/boxed.py"
    done = site.launch(
        "submit", recipe, *TINY, "steps=2", "--cluster", cluster, umask=0, PATH=f"{programs}:{os.environ['PATH']}"
    )
    logs = site.launch("logs", "boxed").stdout
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert site.steps("boxed/boxed") == [1, 2]
    assert {path.lstat().st_uid for path in shared.rglob("*") if path.name != "boxed.py"} == {NOBODY}
    said = [json.loads(line) for line in re.findall(r"INSIDE (.*)", logs)]
    library = "/opt/prune-opd/venv/lib/python3.11/site-packages"
    expected = [
        "/opt/prune-opd/venv",
        f"{library}/prune_opd/__init__.py",
        f"{library}/prune_opd/recipes/__init__.py",
        NOBODY,
    ]
    assert said and all(one[:4] == expected for one in said)
    assert {tuple(one[4]) for one in said} == {("/workspace/runs",)}  # nothing else of this machine


def test_through_ssh(site: Site, trained: subprocess.CompletedProcess[str]) -> None:
    sshd = Sshd(site.slurm.folder / "ssh", site.slurm.environment)
    try:
        cluster = site.cluster(
            "remote",
            nodes=1,
            ssh={
                "host": "127.0.0.1", "user": "root", "port": sshd.port, "identity": str(sshd.identity),
                "job_dir": str(site.slurm.folder / "remote"),
            },
        )  # fmt: skip
        recipe = site.recipe("remote", "from prune_opd.recipes.tiny_compatible import tiny_compatible as remote\n")
        finished = ("--run-dir", str(site.runs / "tiny_compatible"))  # nothing is left to do there
        submit = ("submit", recipe, *TINY, "steps=2", *finished, "--cluster", cluster)
        done = site.launch(*submit, PATH=f"{sshd.programs}:{os.environ['PATH']}")
        logs = site.launch("logs", "remote").stdout
        assert done.returncode == 0, done.stdout + done.stderr + logs
        assert "is finished" in logs
    finally:
        sshd.stop()
