"""FLOP/s, MFU and tokens/s of a step: the formula by hand on three shapes, and the plan beside it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from prune_opd.config import TrainConfig
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe
from prune_opd.data.prompt import Prompt
from prune_opd.model_spec import ModelSpec
from prune_opd.plan.speed import PHASES, SpeedMeter, peak_flops, step_flops
from prune_opd.rollout.batch import Group, Response, Rollouts

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 5, "norm_topk_prob": True}
# A layer's products with one token: queries and output 2 · 8 · 24, keys and values 2 · 8 · 12, three of the FFN.
ATTENTION = 2 * 8 * 24 + 2 * 8 * 12
SHAPES = {
    "dense": (BASE, 3 * (ATTENTION + 3 * 8 * 20), 3 * 24),
    "wider, one group": (
        BASE | {"hidden_size": 16, "num_key_value_heads": 1, "num_hidden_layers": 2},
        2 * (2 * 16 * 24 + 2 * 16 * 6 + 3 * 16 * 20),
        2 * 24,
    ),
    # two of eight experts; query and key norms (2 · 6 a layer) are counted with the matrices
    "experts": (BASE | EXPERTS | {"model_type": "qwen3_moe"}, 3 * (ATTENTION + 3 * 8 * 5 * 2 + 2 * 6), 3 * 24),
}


def spec(settings: dict[str, Any]) -> ModelSpec:
    return ModelSpec.of(settings, "by hand")


def rollouts(*rows: tuple[int, int], stale: int = 0) -> Rollouts:
    """rows: prompt and response tokens; rows of one prompt length are of one prompt."""
    prompts = tuple(Prompt(prompt, (1,) * prompt, None, "test") for prompt, _ in rows)
    responses = tuple(Response((2,) * response, finished=True, stale=stale) for _, response in rows)
    return Rollouts(prompts, responses)


@pytest.mark.parametrize("shape", SHAPES)
def test_operations_by_hand(shape: str) -> None:
    """Two responses of 3 and 5 tokens to a prompt of 4: rows of 6 and 8 tokens go through the models."""
    settings, body, width = SHAPES[shape]
    hidden = settings["hidden_size"]
    got = step_flops(spec(settings), spec(BASE), rollouts((4, 3), (4, 5)))
    head = 100 * hidden
    attention = [2 * width * (length**2) for length in (7, 9, 4, 6, 8)]  # causal: half of two products of length²
    decoded = 2 * (body + head) * (3 + 5) + attention[0] + attention[1] - 2 * attention[2]
    assert got["rollout"] == pytest.approx(decoded + 2 * body * 4 + attention[2])
    _, teacher_body, teacher_width = SHAPES["dense"]
    assert got["teacher"] == pytest.approx(2 * teacher_body * 14 + 2 * teacher_width * (36 + 64))
    student = 2 * body * 14 + attention[3] + attention[4]
    assert got["train"] == pytest.approx(3 * student + 2 * 8 * (3 * head + 100 * 8))


def test_stale_tokens_were_generated_before_and_left_ones_in_this_step() -> None:
    model = spec(BASE)
    fresh, stale = (step_flops(model, model, rollouts((4, 5), stale=count)) for count in (0, 2))
    first_two = step_flops(model, model, rollouts((4, 2)))["rollout"]
    prefill = step_flops(model, model, rollouts((4, 0)))["rollout"]
    assert fresh["rollout"] - stale["rollout"] == pytest.approx(first_two - prefill)
    assert (fresh["teacher"], fresh["train"]) == (stale["teacher"], stale["train"])
    whole = rollouts((4, 5), (6, 3))
    left = replace(rollouts((4, 5)), left=(Group(whole.prompts[1], whole.responses[1:]),))
    assert step_flops(model, model, left)["rollout"] == step_flops(model, model, whole)["rollout"]


def tiny(*overrides: str) -> TrainConfig:
    config = load_recipe("tiny_compatible")
    assert isinstance(config, TrainConfig)
    return apply_overrides(config, list(overrides))


TIMES = {"time_rollout": 2.0, "time_teacher": 1.0, "time_train": 4.0, "time_step": 8.0}


def test_rates_are_of_each_rank_and_the_peak_is_a_setting_on_a_cpu() -> None:
    model, batch = spec(BASE), rollouts((4, 3), (4, 5))
    flops = step_flops(model, model, batch)
    got = SpeedMeter(tiny("planning.peak_flops=1e6"), model, model, ranks=2).record(batch, 16, TIMES)
    for phase in PHASES:
        seconds = TIMES[f"time_{phase}"]
        assert got[f"flops_{phase}"] == pytest.approx(flops[phase] / seconds / 2)
        assert got[f"mfu_{phase}"] == pytest.approx(flops[phase] / seconds / 2 / 1e6)
    assert got["flops_step"] == pytest.approx(sum(flops.values()) / 8 / 2)
    assert (got["speed_rollout"], got["speed_step"]) == (8 / 2 / 2, 8 / 8 / 2)
    assert (got["speed_teacher"], got["speed_train"]) == (14 / 1 / 2, 14 / 4 / 2)
    plain = SpeedMeter(tiny(), model, model, ranks=2).record(batch, 16, TIMES)
    assert peak_flops(tiny()) is None
    assert plain == {name: value for name, value in got.items() if not name.startswith("mfu_")}


def test_a_gpu_has_its_data_sheet_and_its_plan() -> None:
    config = load_recipe("r1_1_5b_from_r1_7b_8xh100")
    assert isinstance(config, TrainConfig) and peak_flops(config) == 989e12
    assert peak_flops(apply_overrides(config, ["planning.peak_flops=5e14"])) == 5e14
    from prune_opd.plan.planner import plan_run
    from prune_opd.plan.time import step_time

    setting = plan_run(config, "h100", 1).setting
    meter = SpeedMeter(config, setting.student, setting.teacher, ranks=8)
    batch = rollouts(*[(256, 2048)] * 256)
    got = meter.record(batch, 2048, TIMES)
    plan = step_time(setting, 2048, plan_run(config, "h100", 1).memory.cache_tokens).seconds
    assert got["planned_time_rollout"] == pytest.approx(plan["rollout"])
    assert got["planned_time_train"] == pytest.approx(plan["train"] + plan["all-reduce"])
    assert got["planned_mfu_train"] == pytest.approx(got["mfu_train"] * TIMES["time_train"] / got["planned_time_train"])
    assert 0.1 < got["planned_mfu_train"] < 0.6, "what the plan assumes of the products, less traffic and short rows"
    assert meter.planned(2048) is meter.planned(2048), "worked out once a horizon"


def test_a_phase_that_took_no_time_gives_a_number() -> None:
    model, batch = spec(BASE), rollouts((4, 3))
    got = SpeedMeter(tiny(), model, model, ranks=1).record(batch, 16, dict.fromkeys(TIMES, 0.0))
    assert all(math.isfinite(value) for value in got.values())
