"""A job on this machine through NeMo-Run: its exit code and its log come back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = REPOSITORY / ".venv-launch" / "bin" / "python"

if not PYTHON.is_file():
    print("\ntests/launch/test_local.py is skipped: make setup-launch has not run", file=sys.__stderr__)
    pytestmark = pytest.mark.skip(reason="make setup-launch has not run")


def test_the_check_refuses_and_its_exit_code_is_the_launchers(tmp_path: Path) -> None:
    cluster = tmp_path / "here.yaml"
    settings = {"kind": "local", "python": sys.executable, "ranks_per_node": 1, "workdir": str(REPOSITORY)}
    cluster.write_text(yaml.safe_dump(settings), encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if name != "RANK"}
    env["NEMORUN_HOME"] = str(tmp_path / "home")

    def launch(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(PYTHON), "-m", "launch", *words]
        return subprocess.run(
            command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120, check=False
        )  # fmt: skip

    done = launch("submit", "tiny_compatibel", "--cluster", str(cluster))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "FAILED, exit code 2" in done.stdout
    assert launch("status", "tiny_compatibel").returncode == 2
    assert "recipe 'tiny_compatibel' is not known" in launch("logs", "tiny_compatibel").stdout
    unknown = launch("logs", "never")
    assert unknown.returncode == 1 and "is not known here" in unknown.stderr
