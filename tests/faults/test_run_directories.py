"""What a run refuses before it touches the disk: a directory it cannot write, another run's, a foreign tokenizer."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prune_opd.check.run import check_train
from prune_opd.config import TrainConfig, to_dict
from prune_opd.config.changes import changes, is_harmless
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.yaml import save_config
from tests import fake_models
from tests.distributed.ranks import REPOSITORY

RECIPE = """
from pathlib import Path
from prune_opd.config.yaml import load_config

def faulty():
    return load_config(Path(__file__).with_name("faulty.yaml"))
"""


@pytest.fixture
def pair(tmp_path: Path) -> TrainConfig:
    student, teacher = (fake_models.write_model(tmp_path / name) for name in ("student", "teacher"))
    return fake_models.train_config(student, teacher)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A directory that nobody can write to: for root that takes a file system which is mounted read-only."""
    folder = tmp_path / "read_only"
    folder.mkdir()
    mounted = os.geteuid() == 0
    if mounted:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(folder)], capture_output=True)
        if done.returncode != 0:
            pytest.skip("root can write everywhere, and nothing can be mounted here")
    else:
        folder.chmod(0o555)
    yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def under_torchrun(config: TrainConfig, folder: Path, run_dir: Path, *options: str) -> tuple[int, str]:
    """`torchrun --nproc-per-node 2 … train`: the exit code, and what the ranks printed."""
    save_config(config, folder / "faulty.yaml")
    recipe = folder / "faulty.py"
    recipe.write_text(RECIPE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "prune_opd.cli", "train", str(recipe), "--run-dir", str(run_dir), *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_a_read_only_run_directory_and_a_foreign_tokenizer_are_refused_by_the_ranks(
    pair: TrainConfig, tmp_path: Path, read_only: Path
) -> None:
    reordered = fake_models.tokenizer(vocab={token: i for i, token in enumerate(reversed(fake_models.TOKENS))})
    foreign = fake_models.write_model(tmp_path / "foreign", reordered)
    config = dataclasses.replace(pair, teacher=str(foreign))
    code, output = under_torchrun(config, tmp_path, read_only / "run")
    assert code == 1
    assert f"error: --run-dir {read_only / 'run'} cannot be written: no permission in {read_only}" in output
    assert f"error: teacher = '{foreign}' has another tokenizer than the student: id 2 is" in output


def test_the_directory_of_another_run_is_refused_by_the_ranks_and_left_as_it_was(
    pair: TrainConfig, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    save_config(apply_overrides(pair, ["gate.threshold=0.25"]), run_dir / "config.yaml")
    before = (run_dir / "config.yaml").read_bytes()
    code, output = under_torchrun(pair, tmp_path, run_dir)
    assert code == 1
    assert "gate.threshold: 0.25 → 0.7" in output and "--allow-config-change" in output
    assert [path.name for path in run_dir.iterdir()] == ["config.yaml"]
    assert (run_dir / "config.yaml").read_bytes() == before


DANGEROUS = (
    "objective.k=4",
    "gate.threshold=0.1",
    "data.min_steps=5",
    "student=elsewhere",
    "seed=9",
    "optimizer.lr=1e-5",
)


@pytest.mark.parametrize("override", DANGEROUS)
def test_dangerous_changes_take_a_flag(pair: TrainConfig, tmp_path: Path, override: str) -> None:
    save_config(apply_overrides(pair, [override]), tmp_path / "run" / "config.yaml")
    (refusal,) = check_train(pair, 2, tmp_path / "run", "auto")
    assert override.partition("=")[0] in refusal
    assert check_train(pair, 2, tmp_path / "run", "auto", allow_config_change=True) == []


def test_every_change_is_reported_field_by_field(pair: TrainConfig, tmp_path: Path) -> None:
    overrides = ["checkpoint.every=3", "survival.max_skipped=9", "gate.k=2"]
    save_config(apply_overrides(pair, overrides), tmp_path / "config.yaml")
    found = changes(pair, tmp_path, "auto")
    assert found == ["gate.k: 2 → 4", "checkpoint.every: 3 → 50", "survival.max_skipped: 9 → 3"]
    assert [line for line in found if not is_harmless(line)] == ["gate.k: 2 → 4"]


def test_the_checkpoint_of_another_run_is_held_against_its_settings(pair: TrainConfig, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step_000004"
    checkpoint.mkdir()
    other = to_dict(apply_overrides(pair, ["gate.k=2", "parallel.context=1", "steps=7"]))
    (checkpoint / "state.json").write_text(json.dumps({"config": other}))
    (refusal,) = check_train(pair, 2, tmp_path / "new", str(checkpoint))
    assert "steps: 7 → 3; gate.k: 2 → 4" in refusal
    assert check_train(pair, 2, tmp_path / "new", str(checkpoint), allow_config_change=True) == []
