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

    recipe = tmp_path / "brought.py"  # a job brings it along
    recipe.write_text("from prune_opd.recipes.tiny_compatible import tiny_compatible as brought\n", encoding="utf-8")
    done = launch("submit", str(recipe), "data.source=missing.jsonl", "--ranks", "1", "--cluster", str(cluster))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "brought.py: 1 node × 1 ranks (the recipe: 1 × 2); student comes with the package" in done.stderr
    assert "FAILED, exit code 1" in done.stdout
    assert launch("status", "brought").returncode == 1
    assert "data.source = 'missing.jsonl': there is no such file" in launch("logs", "brought").stdout
    unknown = launch("logs", "never")
    assert unknown.returncode == 1 and "is not known here" in unknown.stderr
