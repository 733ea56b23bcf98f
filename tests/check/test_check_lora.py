"""What `prune-opd check` says of adapters: experts, FP8 weights, too many rows, and runs that are gone on with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from prune_opd.check.run import check_structure, check_train
from prune_opd.config import LoraConfig, TrainConfig
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.yaml import save_config
from tests import fake_models

EXPERTS = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


@pytest.fixture
def pair(tmp_path: Path) -> TrainConfig:
    student, teacher = (fake_models.write_model(tmp_path / name) for name in ("student", "teacher"))
    return fake_models.train_config(student, teacher, lora=LoraConfig(rank=4))


def test_adapters_pass_on_a_dense_student(pair: TrainConfig) -> None:
    assert check_train(pair, 2, None, "auto") == []


def test_adapters_on_experts_are_refused_by_name(tmp_path: Path, pair: TrainConfig) -> None:
    student = fake_models.write_model(tmp_path / "moe", **EXPERTS)
    config = replace(pair, student=str(student), parallel=replace(pair.parallel, tensor=1))
    (problem,) = check_structure(config, 1)
    assert "lora.targets has linear_fc1 and linear_fc2, and the student has experts" in problem
    assert "set lora.targets=[linear_qkv,linear_proj]" in problem
    attention = replace(config, lora=LoraConfig(rank=4, targets=("linear_qkv", "linear_proj")))
    assert check_structure(attention, 1) == []


def test_a_rank_above_the_models_width_is_refused(pair: TrainConfig) -> None:
    (problem,) = check_structure(replace(pair, lora=LoraConfig(rank=65)), 2)
    assert "lora.rank = 65 is above hidden_size = 64" in problem


def test_weights_that_are_kept_in_fp8_are_refused(pair: TrainConfig) -> None:
    settings = ["precision.params=bf16", "precision.student_fp8.format=hybrid", "precision.student_fp8.param=true"]
    problems = check_structure(apply_overrides(pair, [*settings, "parallel.distributed_optimizer=true"]), 2)
    assert any("precision.student_fp8.param = True with lora.rank > 0" in problem for problem in problems)


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        (LoraConfig(), LoraConfig(rank=4), "lora.rank: 0 → 4"),
        (LoraConfig(rank=4), LoraConfig(), "lora.rank: 4 → 0"),
        (LoraConfig(rank=4), LoraConfig(rank=8), "lora.rank: 4 → 8"),
        (LoraConfig(rank=4), LoraConfig(rank=4, targets=("linear_qkv",)), "lora.targets: "),
    ],
)
def test_a_run_does_not_go_on_with_other_adapters_whatever_the_flag(
    tmp_path: Path, pair: TrainConfig, before: LoraConfig, now: LoraConfig, named: str, allowed: bool
) -> None:
    save_config(replace(pair, lora=before), tmp_path / "run" / "config.yaml")
    (refusal,) = check_train(replace(pair, lora=now), 2, tmp_path / "run", "auto", allow_config_change=allowed)
    assert named in refusal and "cannot be loaded with others" in refusal


def test_another_alpha_takes_the_flag(tmp_path: Path, pair: TrainConfig) -> None:
    save_config(pair, tmp_path / "run" / "config.yaml")
    other = replace(pair, lora=LoraConfig(rank=4, alpha=8.0))
    (refusal,) = check_train(other, 2, tmp_path / "run", "auto")
    assert "lora.alpha: 32.0 → 8.0" in refusal and "--allow-config-change" in refusal
    assert check_train(other, 2, tmp_path / "run", "auto", allow_config_change=True) == []
