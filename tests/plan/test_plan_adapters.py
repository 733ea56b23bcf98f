"""What adapters change in a plan. Bytes against real parts: test_plan_memory.py and the rehearsals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prune_opd.check.machine import checkpoint_bytes
from prune_opd.config import LoraConfig, TrainConfig
from prune_opd.config import memory_phases as phases
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe
from prune_opd.plan.adapters import adapter_parameters, trained_on_fullest
from prune_opd.plan.counts import largest_rank, parameters
from prune_opd.plan.memory import plan_memory
from prune_opd.plan.setting import setting_of
from prune_opd.plan.speed import step_flops
from prune_opd.plan.time import step_time
from tests.plan.test_speed import rollouts

NAME = "qwen3_8b_from_32b_32xh100_fp8"


def recipe(*overrides: str) -> TrainConfig:
    config = load_recipe(NAME)
    assert isinstance(config, TrainConfig)
    return apply_overrides(config, list(overrides))


def test_gradients_and_optimizer_are_those_of_the_adapters() -> None:
    full, lora = (setting_of(recipe(f"lora.rank={rank}"), "h100", 4) for rank in (0, 32))
    parts = [plan_memory(setting).parts for setting in (full, lora)]
    share = trained_on_fullest(lora).all / largest_rank(full.student, full.student_layout).all
    assert 0.005 < share < 0.02
    for part in (phases.GRADIENTS, phases.OPTIMIZER):
        assert parts[1][part] == pytest.approx(share * parts[0][part])
    assert parts[1][phases.STUDENT] == pytest.approx((1 + share) * parts[0][phases.STUDENT])


def test_a_step_saves_the_weights_gradients() -> None:
    seconds = [
        step_time(setting_of(recipe(f"lora.rank={rank}"), "h100", 4), 4096, 1e6, ("train", "all-reduce")).seconds
        for rank in (0, 32)
    ]
    assert 0.6 < seconds[1]["train"] / seconds[0]["train"] < 0.85
    assert seconds[1]["all-reduce"] < 0.1 * seconds[0]["all-reduce"]


def test_operations_of_frozen_matrices_are_two_thirds_and_the_adapters_own() -> None:
    spec = setting_of(recipe(), "h100", 4).student
    lora = LoraConfig(rank=32)
    full, ours = (step_flops(spec, spec, rollouts((4, 5)), (), one) for one in (LoraConfig(), lora))
    own = 6 * adapter_parameters(spec, lora) * 8  # a row of 4 + 5 tokens predicts from 8
    heads = 2 * 5 * spec.vocab_size * spec.hidden  # the teacher's product with its head
    assert ours["train"] - own - heads == pytest.approx((full["train"] - heads) * 2 / 3)
    assert ours["teacher"] == full["teacher"] and ours["rollout"] == full["rollout"]


def test_tensor_parallel_ranks_hold_one_of_each_pair_whole() -> None:
    spec = setting_of(recipe(), "h100", 4).student
    lora = LoraConfig(rank=8, targets=("linear_proj",))
    width = spec.heads * spec.head_dim
    assert adapter_parameters(spec, lora) == spec.layers * 8 * (spec.hidden + width)
    assert adapter_parameters(spec, lora, tensor=4, layers=2) == 2 * 8 * (spec.hidden + width // 4)
    assert adapter_parameters(spec, LoraConfig()) == 0


def test_checkpoints_are_planned_without_the_students_weights() -> None:
    config = recipe("lora.rank=32", "checkpoint.keep=1", "checkpoint.export_hf=false")
    spec = setting_of(config, "h100", 4).student
    assert checkpoint_bytes(config) == 2 * (2 + 12) * adapter_parameters(spec, config.lora)
    assert checkpoint_bytes(replace(config, lora=LoraConfig())) == 2 * (2 + 12) * parameters(spec)
