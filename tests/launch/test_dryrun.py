"""What NeMo-Run would submit, for every cluster file: golden files, shellcheck, and that a dry run changes nothing.

To write the golden files anew: GOLDEN=write pytest tests/launch/test_dryrun.py
"""

import json
import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = REPOSITORY / ".venv-launch" / "bin" / "python"
GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in (REPOSITORY / "launch" / "clusters").glob("*.yaml"))
# In NeMo-Run's own lines (unquoted nodes and exit code, an address that we do not use).
ITS_OWN = "SC2206,SC2207,SC2128,SC2086,SC2034"

if not PYTHON.is_file():
    print("\ntests/launch/test_dryrun.py is skipped: make setup-launch has not run", file=sys.__stderr__)
    pytestmark = pytest.mark.skip(reason="make setup-launch has not run")


DryRun = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DryRun]:
    """`python -m launch submit words… --dry-run`, in a fork (`dry_runs.py`); anew: in a new interpreter."""
    server = subprocess.Popen(
        [PYTHON, Path(__file__).with_name("dry_runs.py")],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(home: Path, *words: str, anew: bool = False) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "NEMORUN_HOME": str(home), "WANDB_API_KEY": "planted-8ab0", "PYTHONPATH": ""}
        line = ["submit", *words, "--dry-run"]
        if anew:
            command = [str(PYTHON), "-m", "launch", *line]
            return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120)
        assert server.stdin is not None and server.stdout is not None
        files = [tmp_path_factory.mktemp("dry_run") / name for name in ("out", "err")]
        print(json.dumps([line, env, *map(str, files)]), file=server.stdin, flush=True)
        if not select.select([server.stdout], [], [], 120)[0]:
            server.kill()
            raise AssertionError(f"not done after 120 s: {words}")
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(line, code, *(file.read_text(encoding="utf-8") for file in files))

    yield run
    server.communicate(timeout=30)


@pytest.fixture(scope="module", params=NAMES)
def printed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, dry_run: DryRun
) -> tuple[str, str, Path]:
    """A cluster file's name, what the dry run printed, and NeMo-Run's home."""
    home = tmp_path_factory.mktemp("home") / "nemorun"
    nodes = ["--nodes", "2", "--ranks", "1"] if request.param.startswith("slurm") else []
    task = ["--evaluate", "my task's.jsonl"] if request.param.startswith("slurm") else []
    anew = request.param == "slurm"
    done = dry_run(home, "tiny_compatible", "name=a b$c", "--cluster", request.param, *nodes, *task, anew=anew)
    assert done.returncode == 0, done.stderr
    text = done.stdout.replace(str(home), "/HOME").replace(str(REPOSITORY), "/REPOSITORY")
    return request.param, re.sub(r"tiny_compatible_\d+", "tiny_compatible_ID", text), home


def test_scripts_are_the_golden_ones(printed: tuple[str, str, Path]) -> None:
    name, text, _ = printed
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("GOLDEN") == "write":
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


def test_a_dry_run_changes_nothing_and_shows_no_secret(printed: tuple[str, str, Path]) -> None:
    _, text, home = printed
    assert not home.exists()
    assert "planted-8ab0" not in text


def test_shellcheck_finds_nothing(printed: tuple[str, str, Path], tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (scripts/setup_slurm_test.sh brings it)")
    parts = [
        ("job.sh", printed[1]),
        *re.findall(r"^cat >(\S+) <<'END_OF_FILE'\n(.*?)^END_OF_FILE$", printed[1], re.M | re.S),
    ]
    assert len(parts) > 1
    for name, script in parts:
        path = tmp_path / name.replace("/", "-")
        path.write_text(script, encoding="utf-8")
        excluded = ITS_OWN if name.endswith("_sbatch.sh") else "SC2016"  # that nothing expands is what we want
        done = subprocess.run(["shellcheck", "-e", excluded, path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_one_task_a_node_and_no_retries_of_nemo_runs(printed: tuple[str, str, Path]) -> None:
    name, text, _ = printed
    if not name.startswith("slurm"):
        pytest.skip("only Slurm has batch scripts")
    assert "--ntasks-per-node=1\n" in text
    assert "TORCHX_MAX_RETRIES=0\n" in text  # it would queue any failure again
    assert "WANDB_API_KEY" not in text  # nothing is online
    assert "--job-name=prune-opd.tiny_compatible.train\n" in text
    assert "--kill-on-invalid-dep=yes" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny_compatible", "--cluster", "nowhere"], "is not known: choose"),
        (["tiny_compatible", "horizon.strategy", "--cluster", "slurm"], "is not a setting"),
        (["tiny_compatible", "--no-such-option"], "No such option"),
        (["tiny_compatibel", "--cluster", "slurm"], "recipe 'tiny_compatibel' is not known: did you mean"),
        (["tiny_compatible", "gate.kk=1", "--cluster", "slurm"], "there is no setting 'gate.kk'"),
        (["missing.py", "--cluster", "slurm"], "there is no such .py file"),
        (["tiny_base", "--cluster", "slurm"], "is not for training"),
        (["tiny_compatible", "--cluster", "slurm", "--ranks", "3"], "parallel.tensor = 3"),
    ],
)
def test_bad_input_never_exits_with_0(tmp_path: Path, dry_run: DryRun, words: list[str], said: str) -> None:
    done = dry_run(tmp_path / "home", *words, anew="--ranks" in words)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


OWN = (
    '"""$HOME `id` \\n and /nemo_run"""\nEND_OF_FILE = 1\n'
    "from prune_opd.recipes.tiny_compatible import tiny_compatible as own\n"
)
FAKE = """#!/bin/sh
# sbatch, srun and docker: start what a node would
case "$0" in
*docker) while [ "$1" != prune-opd ]; do case "$1" in *:/nemo_run) folder=${1%:/nemo_run};; esac; shift; done
    exec bash "$folder/scripts/train.sh";;
*) for word; do :; done; folder=${word%_sbatch.sh}; echo 7
    exec bash "$folder/scripts/train.sh" >&2;;
esac
"""


@pytest.mark.parametrize("name", NAMES)
def test_an_own_recipe_travels_with_the_script_and_with_the_job(name: str, tmp_path: Path, dry_run: DryRun) -> None:
    recipe, home, programs = tmp_path / "own.py", tmp_path / "home", tmp_path / "bin"
    recipe.write_text(OWN, encoding="utf-8")
    settings = yaml.safe_load((REPOSITORY / "launch" / "clusters" / f"{name}.yaml").read_text(encoding="utf-8"))
    settings |= {"python": "echo", "environment": {}} | ({"workdir": str(tmp_path)} if name == "slurm" else {})
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(yaml.safe_dump(settings), encoding="utf-8")
    done = dry_run(home, str(recipe), "--cluster", str(cluster), "--ranks", "1")
    assert done.returncode == 0, done.stderr
    recipe.unlink()
    programs.mkdir()
    for program in ("sbatch", "docker"):
        (programs / program).write_text(FAKE, encoding="utf-8")
        (programs / program).chmod(0o755)
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    ran = subprocess.run(["bash", "-c", done.stdout], env=env, capture_output=True, text=True, check=True)
    (brought,) = home.glob("experiments/own/*/train/code/own.py")
    assert brought.read_text(encoding="utf-8") == OWN
    assert str(brought) in ran.stdout + ran.stderr


def test_nemo_run_unpacks_what_a_job_brings_where_the_job_starts(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from launch.cluster import load_cluster
from launch.jobs import Submission, plan_jobs
from launch.experiment import build
cluster = load_cluster("slurm-pyxis")
with build("own", plan_jobs(Submission(sys.argv[1], export="/x"), cluster), cluster) as experiment:
    experiment.dryrun(log=False, delete_exp_dir=False)
"""
    recipe = tmp_path / "my $run's.py"
    recipe.write_text(OWN, encoding="utf-8")
    env = {**os.environ, "NEMORUN_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    done = subprocess.run(
        [str(PYTHON), "-c", program, str(recipe)], cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = sorted((tmp_path / "home").glob("experiments/own/*/*/code/*"))
    assert [path.parent.parent.name for path in found] == ["export", "train"]
    assert {path.name for path in found} == {recipe.name} and {path.read_text(encoding="utf-8") for path in found} == {
        OWN
    }
