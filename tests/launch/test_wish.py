"""What a submission takes, and what is said and refused before it. No NeMo-Run."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from launch.cluster import Cluster, load_cluster, without_idle_secrets
from launch.jobs import Submission
from launch.wish import describe, seconds_of, settled, wishes
from prune_opd.errors import ConfigError, UserError

LARGE = "qwen3_8b_from_32b_32xh100_fp8"
SLURM = Cluster(kind="slurm", account="a", run_root="/runs")


def test_nodes_and_ranks_are_the_recipes_unless_told_otherwise() -> None:
    def sizes(cluster: Cluster, nodes: int | None = None, ranks: int | None = None) -> tuple[int, int]:
        (wish,) = wishes(Submission(LARGE), cluster, nodes, ranks)
        return wish.nodes, wish.ranks

    assert sizes(SLURM) == (4, 8)
    assert sizes(replace(SLURM, nodes=2)) == (2, 8)
    assert sizes(replace(SLURM, nodes=2), nodes=8) == (8, 8)
    assert sizes(SLURM, nodes=8, ranks=4) == (8, 4)


@pytest.mark.parametrize(
    ("submission", "message"),
    [
        (Submission("tiny_compatibel"), "did you mean tiny_compatible"),
        (Submission("nowhere.py"), "there is no such .py file"),
        (Submission(LARGE, ("gate.kk=3",)), "there is no setting 'gate.kk'"),
        (Submission(LARGE, ("parallel.tensor=3",)), "parallel.tensor = 3 does not divide"),
        (Submission(LARGE, ("horizon.max_len=99999",)), "positions of the student"),
        (Submission(LARGE, sweep=("gate.k=4,four",)), "gate.k = 'four' has the wrong type"),
        (Submission("tiny_base"), "is not for training"),
    ],
)
def test_what_cannot_run_stops_before_it_is_submitted(submission: Submission, message: str) -> None:
    with pytest.raises(UserError, match=message):
        wishes(submission, SLURM, None, None)


def test_the_line_before_sbatch_says_size_hours_mounts_and_models() -> None:
    cluster = load_cluster("slurm-pyxis")
    (wish,) = wishes(Submission(LARGE), cluster, 8, None)
    line = describe(wish, settled(cluster, wish))
    assert (
        "8 nodes × 8 ranks (the recipe: 4 × 8)" in line and "mounts /shared/models, /shared/data, /shared/runs" in line
    )
    assert "student /shared/models/Qwen/Qwen3-8B not checkable from here" in line, "the cluster file sets the folders"
    assert "planned " in line and " h on h100" in line
    assert "PRUNE_OPD_MODELS" not in os.environ


def test_a_model_is_looked_for_behind_its_mount(tmp_path: Path) -> None:
    there = tmp_path / "Qwen" / "Qwen3-8B"
    there.mkdir(parents=True)
    (there / "config.json").write_text('{"model_type": "qwen3"}', encoding="utf-8")
    cluster = Cluster(
        kind="docker",
        container_image="i",
        container_mounts=(f"{tmp_path}:/models:ro", "/runs:/runs"),
        run_root="/runs",
        environment={"PRUNE_OPD_MODELS": "/models"},
    )
    (wish,) = wishes(Submission(LARGE), cluster, 1, 8)
    line = describe(wish, cluster)
    assert "student /models/Qwen/Qwen3-8B present; teacher /models/Qwen/Qwen3-32B ABSENT" in line
    assert "is under no mount" in describe(wish, replace(cluster, container_mounts=()))


def test_the_signal_leaves_time_for_a_step_and_a_checkpoint() -> None:
    (wish,) = wishes(Submission(LARGE), SLURM, None, None)
    assert wish.plan is not None and wish.signal > wish.plan.full.total + 90
    assert settled(SLURM, wish).signal_before_end == wish.signal
    assert settled(replace(SLURM, signal_before_end=77), wish).signal_before_end == 77
    with pytest.raises(ConfigError, match="no step would end"):
        settled(replace(SLURM, time="00:05:00"), wish)


def test_a_time_limit_in_seconds() -> None:
    assert seconds_of("04:00:00") == 14400 and seconds_of("1-00:00:10") == 86410


def test_nobody_needs_a_key_for_wandb_that_is_not_asked() -> None:
    cluster = replace(SLURM, secrets={"WANDB_API_KEY": "environment", "HF_TOKEN": "/s/hf"})
    assert list(without_idle_secrets(cluster, online=False).secrets) == ["HF_TOKEN"]
    assert without_idle_secrets(cluster, online=True) == cluster


IN_IMAGE = replace(SLURM, container_image="/i.sqsh", container_mounts=("/a/runs:/runs", "/d:/runs/data:ro"))


@pytest.mark.parametrize(
    ("submission", "cluster", "message"),
    [
        (Submission(LARGE, run_dir="runs/x"), IN_IMAGE, "--run-dir = 'runs/x' is relative, and jobs start in a folder"),
        (Submission(LARGE), replace(IN_IMAGE, run_root="runs"), "run_root = 'runs' is relative"),
        (Submission(LARGE), replace(SLURM, run_root="runs"), "give an absolute path, or set workdir"),
        (Submission(LARGE, run_dir="/scratch/x"), IN_IMAGE, "is under no mount, so it would go with the container"),
        (Submission(LARGE, export="/runsx/out"), IN_IMAGE, r"choose a folder under one \(/runs, /runs/data\)"),
        (Submission(LARGE, run_dir="/runs/data/x"), IN_IMAGE, "is under /d:/runs/data:ro, which can only be read"),
        (Submission(LARGE, evaluate="ledgre"), IN_IMAGE, "--evaluate = 'ledgre' is no task: did you mean 'ledger'?"),
        (Submission(LARGE), replace(SLURM, gpus_per_node=4), "8 ranks a node and gpus_per_node = 4: every rank takes"),
        (Submission(LARGE, sweep=("gate.k=[4,8]",)), SLURM, "its values stand without brackets, gate.k=4,8"),
    ],
)
def test_what_would_be_lost_or_not_found_stops_before_it_is_submitted(
    submission: Submission, cluster: Cluster, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        wishes(submission, cluster, None, None)


def test_places_that_a_job_can_write_to_pass() -> None:
    for submission in (
        Submission(LARGE, run_dir="/runs"),
        Submission(LARGE, export="/runs/a", evaluate="my tasks.jsonl"),
    ):
        assert wishes(submission, IN_IMAGE, None, None)
    assert wishes(Submission(LARGE), replace(SLURM, run_root="runs", workdir="/repository"), None, None)
    assert wishes(Submission("tiny_compatible"), Cluster(kind="local"), None, None)
