"""What is refused of a run directory: another run, other files, a checkpoint that would be overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from prune_opd.check import machine
from prune_opd.check.run import check_train
from prune_opd.config import TrainConfig
from prune_opd.config.changes import HARMLESS
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.yaml import save_config
from tests.fake_models import train_config, write_model


@pytest.fixture
def pair(tmp_path: Path) -> TrainConfig:
    return train_config(write_model(tmp_path / "student"), write_model(tmp_path / "teacher"))


def only(found: list[str]) -> str:
    assert len(found) == 1, found
    assert "\n" not in found[0]
    return found[0]


def in_run_dir(config: TrainConfig, run_dir: Path, resume: str = "auto") -> list[str]:
    return check_train(config, 2, run_dir, resume)


@pytest.fixture
def run_dir(pair: TrainConfig, tmp_path: Path) -> Path:
    save_config(pair, tmp_path / "run" / "config.yaml")
    return tmp_path / "run"


def test_a_new_or_an_empty_run_directory_is_fine(pair: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert in_run_dir(pair, tmp_path / "empty") == []
    assert in_run_dir(pair, tmp_path / "new" / "deeper") == []
    assert not (tmp_path / "new").exists()


def test_a_directory_of_other_files_is_refused(pair: TrainConfig, tmp_path: Path) -> None:
    assert "holds other files and no config.yaml" in only(in_run_dir(pair, tmp_path))


def test_the_run_of_another_config_is_refused_by_the_fields_that_differ(pair: TrainConfig, run_dir: Path) -> None:
    line = only(in_run_dir(apply_overrides(pair, ["seed=7", "optimizer.lr=0.5"]), run_dir))
    assert "optimizer.lr: 1.0e-06 → 0.5; seed: 0 → 7" in line and "choose another directory" in line


def test_an_older_run_with_uniform_weights_of_one_is_another_run(pair: TrainConfig, run_dir: Path) -> None:
    config = apply_overrides(pair, ["objective.weight=none"])
    path = run_dir / "config.yaml"
    save_config(config, path)
    assert in_run_dir(config, run_dir) == []
    path.write_text(path.read_text().replace("  ends: as_is\n", ""))
    line = only(in_run_dir(config, run_dir))
    assert "objective.weight: none (1 for each id, an older version's) → none (1/|support|)" in line
    assert check_train(config, 2, run_dir, "auto", allow_config_change=True) == []
    assert in_run_dir(apply_overrides(pair, ["objective.weight=student_p"]), run_dir) != []


def test_many_differences_are_cut_short(pair: TrainConfig, run_dir: Path) -> None:
    many = [f"rollout.{name}=9" for name in ("prompts", "responses", "max_prompt_len", "max_num_seqs", "temperature")]
    line = only(in_run_dir(apply_overrides(pair, [*many, "seed=1", "data.min_steps=5", "gate.k=3"]), run_dir))
    assert "and 2 more" in line


HARMLESS_CHANGES = {
    "parallel": "parallel.tensor=1",
    "track": "track.project=other",
    "stop_after": "stop_after=2",
    "checkpoint": "checkpoint.every=7",
    "survival": "survival.max_skipped=5",
    "evaluation.every": "evaluation.every=3",
    "evaluation.generations": "evaluation.generations=0",
    "memory": "memory.offload_optimizer=true",
    "objective.kernels": "objective.kernels=triton",
    "planning": "planning.nodes=2",
    "rollout.bucket_mb": "rollout.bucket_mb=64",
    "rollout.enforce_eager": "rollout.enforce_eager=true",
    "rollout.kv_cache_gb": "rollout.kv_cache_gb=9",
    "rollout.gpu_memory_utilization": "rollout.gpu_memory_utilization=0.4",
    "rollout.logprobs": "rollout.logprobs=false",
    "rollout.parity_every": "rollout.parity_every=5",
    "teacher_cache": "teacher_cache.max_gb=5",
    "teacher_server.url": "teacher_server.url=null",  # of a pair whose objective no server can give
    "teacher_server.concurrency": "teacher_server.concurrency=2",
    "teacher_server.timeout": "teacher_server.timeout=5",
    "teacher_server.retries": "teacher_server.retries=1",
}


@pytest.mark.parametrize("part", HARMLESS)
def test_a_run_goes_on_with_harmless_changes(
    pair: TrainConfig, run_dir: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prune_opd.check.run.kernels_problem", lambda kernels, gpu: None)  # as with a GPU
    assert in_run_dir(apply_overrides(pair, [HARMLESS_CHANGES[part]]), run_dir) == []


def test_the_other_optimizer_is_not_harmless(pair: TrainConfig, run_dir: Path) -> None:
    """Its checkpoints consist of other parts in every layout."""
    changed = apply_overrides(pair, ["parallel.distributed_optimizer=true"])
    assert "parallel.distributed_optimizer: false → true" in only(in_run_dir(changed, run_dir))


def test_other_evaluation_settings_are_not_harmless(pair: TrainConfig, run_dir: Path) -> None:
    assert "evaluation.problems" in only(in_run_dir(apply_overrides(pair, ["evaluation.problems=3"]), run_dir))


def test_a_damaged_config_yaml_is_refused(pair: TrainConfig, run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text("name: [", encoding="utf-8")
    assert "cannot be read as YAML" in only(in_run_dir(pair, run_dir))


def test_checkpoints_are_never_overwritten(pair: TrainConfig, run_dir: Path) -> None:
    (run_dir / "checkpoints").mkdir()
    assert in_run_dir(pair, run_dir, "never") == []
    (run_dir / "checkpoints" / "step_2").mkdir()
    line = only(in_run_dir(pair, run_dir, "never"))
    assert "already holds checkpoints; take --resume auto" in line
    assert in_run_dir(pair, run_dir, "auto") == []


def test_a_missing_checkpoint_is_refused(pair: TrainConfig, run_dir: Path) -> None:
    assert "there is no such checkpoint" in only(in_run_dir(pair, run_dir, str(run_dir / "step_9")))


def test_a_file_in_the_way_is_refused(pair: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"{tmp_path / 'file'} is a file" in only(in_run_dir(pair, path))


def test_a_directory_without_permission_is_refused(
    pair: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)  # root may write anywhere
    assert f"no permission in {tmp_path}" in only(in_run_dir(pair, tmp_path / "new"))
