"""The dataclasses refuse a wrong value when they are made, and say which field, which value and what would be right."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest

from prune_opd import config as c
from prune_opd.config.method import OBJECTIVES
from prune_opd.config.overrides import apply_overrides
from prune_opd.errors import ConfigError, UserError
from prune_opd.recipes.qwen3_8b_from_32b_32xh100_fp8 import qwen3_8b_from_32b_32xh100_fp8
from prune_opd.recipes.r1_1_5b_from_r1_7b_8xh100 import r1_1_5b_from_r1_7b_8xh100
from prune_opd.recipes.tiny_compatible import tiny_compatible


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (lambda: c.GateConfig(metric="overlp"), "gate.metric", "'overlp'"),
        (lambda: c.GateConfig(k=0), "gate.k", "0"),
        (lambda: c.GateConfig(threshold=1.5), "gate.threshold", "1.5"),
        (lambda: c.GateConfig(threshold=math.nan), "gate.threshold", "nan"),
        (lambda: c.GateConfig(top_p=0.0), "gate.top_p", "0.0"),
        (lambda: c.HorizonConfig(strategy="pruned"), "horizon.strategy", "'pruned'"),
        (lambda: c.HorizonConfig(strategy="full", max_len=10, min_len=20), "horizon.min_len", "20"),
        (lambda: c.ObjectiveConfig(temperature=0.0), "objective.temperature", "0.0"),
        (lambda: c.ObjectiveConfig(name="reverse_kl"), "objective.name", "'reverse_kl'"),
        (lambda: c.ObjectiveConfig(support="both"), "objective.support", "'both'"),
        (lambda: c.ObjectiveConfig(weight="student"), "objective.weight", "'student'"),
        (lambda: c.ObjectiveConfig(name="full_vocab_jsd", beta=0.0), "objective.beta", "0.0"),
        (lambda: c.ObjectiveConfig(name="full_vocab_jsd", beta=1.0), "objective.beta", "1.0"),
        (lambda: c.ObjectiveConfig(clip=0.0), "objective.clip", "0.0"),
        (lambda: c.ObjectiveConfig(dual_clip=1.0), "objective.dual_clip", "1.0"),
        (lambda: c.ObjectiveConfig(mismatch="tis"), "objective.mismatch", "'tis'"),
        (lambda: c.ObjectiveConfig(mismatch_low=1.0), "objective.mismatch_low", "1.0"),
        (lambda: c.ObjectiveConfig(mismatch_high=1.0), "objective.mismatch_high", "1.0"),
        (lambda: c.RolloutConfig(parity_every=-1), "rollout.parity_every", "-1"),
        (lambda: c.SurvivalConfig(max_mismatch=-0.1), "survival.max_mismatch", "-0.1"),
        (lambda: c.WeightingConfig(name="eopd"), "weighting.name", "'eopd'"),
        (lambda: c.WeightingConfig(retain=0.0), "weighting.retain", "0.0"),
        (lambda: c.WeightingConfig(gamma=-0.5), "weighting.gamma", "-0.5"),
        (lambda: c.OptimizerConfig(updates_per_batch=0), "optimizer.updates_per_batch", "0"),
        (lambda: c.RolloutConfig(prompts=0), "rollout.prompts", "0"),
        (lambda: c.DataConfig(min_steps=30, max_steps=20), "data.max_steps", "20"),
        (lambda: c.OptimizerConfig(lr=1e-6, min_lr=1e-3), "optimizer.min_lr", "0.001"),
        (lambda: c.ParallelConfig(tensor=0), "parallel.tensor", "0"),
        (lambda: c.PrecisionConfig(params="fp16"), "precision.params", "'fp16'"),
        (lambda: c.PrecisionConfig(student_fp8=c.Fp8Config(format="e5m2")), "precision.student_fp8.format", "'e5m2'"),
        (lambda: c.PrecisionConfig(teacher_fp8=c.Fp8Config(recipe="block")), "precision.teacher_fp8.recipe", "'block'"),
        (lambda: c.PrecisionConfig(student_fp8=c.Fp8Config(amax_history=0)), "precision.student_fp8.amax_history", "0"),
        (lambda: c.RolloutConfig(quantization="e4m3"), "rollout.quantization", "'e4m3'"),
        (lambda: c.RolloutConfig(kv_cache_dtype="fp16"), "rollout.kv_cache_dtype", "'fp16'"),
        (lambda: c.RolloutConfig(head_dtype="bf16"), "rollout.head_dtype", "'bf16'"),
        (lambda: c.MemoryConfig(sleep_level=3), "memory.sleep_level", "3"),
        (lambda: c.EvalConfig(samples=0), "evaluation.samples", "0"),
        (lambda: c.EvalConfig(extract="boxed"), "evaluation.extract", "'boxed'"),
        (lambda: c.CheckpointConfig(keep=0), "checkpoint.keep", "0"),
        (lambda: c.TrackConfig(wandb="on"), "track.wandb", "'on'"),
        (lambda: c.TrackConfig(samples=-1), "track.samples", "-1"),
        (lambda: c.TrackConfig(samples_every=0), "track.samples_every", "0"),
    ],
)
def test_a_wrong_value_is_refused_by_name(make: Callable[[], Any], field: str, value: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()
    message = str(error.value)
    assert message.startswith(f"{field} = {value} ")
    assert "choose one of" in message or "give a number" in message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: c.GateConfig(k=2.5), "gate.k = 2.5 has the wrong type: give an integer"),
        (lambda: c.GateConfig(k=True), "gate.k = True has the wrong type: give an integer"),
        (lambda: c.OptimizerConfig(lr="fast"), "optimizer.lr = 'fast' has the wrong type: give a number"),
        (lambda: c.ParallelConfig(tensor="2"), "parallel.tensor = '2' has the wrong type: give an integer, or null"),
        (lambda: c.DataConfig(shuffle=1), "data.shuffle = 1 has the wrong type: give true or false"),
        (lambda: c.DataConfig(suffix=None), "data.suffix = None has the wrong type: give a text"),
        (lambda: c.EvalConfig(sources="a"), "evaluation.sources = 'a' has the wrong type: give a text or several, as "),
        (lambda: c.RolloutConfig(inflight={}), "rollout.inflight = {} has the wrong type: give its settings one by "),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name_in_a_recipe_too(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "make",
    [lambda: c.OptimizerConfig(lr=1), lambda: c.EvalConfig(sources=["a"]), lambda: c.ParallelConfig(tensor=None)],
)
def test_a_whole_number_is_a_number_and_a_list_is_as_good_as_a_tuple(make: Callable[[], Any]) -> None:
    make()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "sampled_token", "support": "teacher"},
            "objective.support = 'teacher' is a setting of topk_reverse_kl",
        ),
        ({"name": "topk_forward_kl", "weight": "none"}, "objective.weight = 'none' is a setting of topk_reverse_kl"),
        ({"name": "full_vocab_reverse_kl", "beta": 0.1}, "objective.beta = 0.1 is a setting of full_vocab_jsd"),
        (
            {"beta": 0.1},
            "objective.beta = 0.1 is a setting of full_vocab_jsd and topk_jsd, and objective.name = topk_reverse_kl",
        ),
    ],
)
def test_a_setting_that_the_objective_has_not_got_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        c.ObjectiveConfig(**settings)


@pytest.mark.parametrize("pattern", ["answer is (", "", "(\\d*)", "x?", "(?=4)", "$"])
def test_a_pattern_that_reads_nothing_is_refused_with_its_remedy(pattern: str) -> None:
    with pytest.raises(ConfigError) as error:
        c.EvalConfig(extract=f"regex:{pattern}")
    assert str(error.value).startswith(f"evaluation.extract = {f'regex:{pattern}'!r} ")
    assert str(error.value).endswith(
        (": correct the pattern", ": let it ask for something, as in regex:answer is (.+)")
    )


def test_a_reader_is_chosen_on_the_command_line_as_it_is_written() -> None:
    for extract in ("last_number", "box_or_last_number", "choice", r"regex:#### *(\S+)", "regex:answer: (.+)"):
        changed = apply_overrides(c.EvalConfig(), [f"extract={extract}"])
        assert changed.extract == extract


def test_the_ledger_has_no_choice_of_readers_and_a_file_beside_it_does() -> None:
    run = tiny_compatible()
    with pytest.raises(ConfigError, match=r"the ledger's answers have one form; set evaluation\.extract=box"):
        apply_overrides(run, ["evaluation.extract=choice"])
    assert apply_overrides(run, ["evaluation.extract=choice", "evaluation.sources=[ledger,a.jsonl]"])


def test_the_papers_recipes_read_boxes_and_the_projects_own_also_numbers() -> None:
    paper, ours = r1_1_5b_from_r1_7b_8xh100(), qwen3_8b_from_32b_32xh100_fp8()
    assert (paper.evaluation.extract, ours.evaluation.extract) == ("box", "box_or_last_number")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_made_by_its_name_alone(name: str) -> None:
    assert c.ObjectiveConfig(name=name).name == name


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"strategy": "topd"}, "horizon.rho"),
        ({"strategy": "prune"}, "horizon.init_len"),
        ({"strategy": "popd"}, "horizon.init_len"),
        ({"strategy": "popd", "init_len": 64}, "horizon.increment"),
        ({"strategy": "popd", "init_len": 64, "increment": 16}, "horizon.interval"),
    ],
)
def test_unpublished_constants_must_be_set_where_they_are_used(settings: dict[str, Any], missing: str) -> None:
    with pytest.raises(ConfigError, match=f"^{missing} is not set: "):
        c.HorizonConfig(**settings)


def test_full_needs_no_other_setting() -> None:
    assert c.HorizonConfig(strategy="full").max_len == 12288


def test_the_gates_defaults_are_the_papers() -> None:
    gate = c.GateConfig()
    assert (gate.metric, gate.k, gate.threshold, gate.w_drop, gate.w_base) == ("overlap", 16, 0.7, 0.01, 0.5)


def test_prune_without_a_gate_is_refused() -> None:
    horizon = c.HorizonConfig(strategy="prune", init_len=64)
    with pytest.raises(ConfigError, match=r"gate = null with horizon\.strategy = prune"):
        c.TrainConfig(name="x", student="s", teacher="t", steps=1, horizon=horizon, gate=None)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["rollout.logprobs=false"], "rollout.logprobs = false"),
        (["rollout.temperature=0.7"], "rollout.temperature = 0.7"),
        (["objective.temperature=0.7"], "objective.temperature = 0.7"),
        (["rollout.top_p=0.9"], "rollout.top_p = 0.9"),
    ],
)
def test_a_correction_needs_the_ratio_of_the_policy_that_sampled(overrides: list[str], named: str) -> None:
    apply_overrides(tiny_compatible(), overrides)
    with pytest.raises(ConfigError, match=f"objective.mismatch = masked with {named}: .*objective.mismatch=none"):
        apply_overrides(tiny_compatible(), ["objective.mismatch=masked", *overrides])


def test_the_limit_of_the_mismatch_follows_the_format_of_the_rollouts() -> None:
    tiny, large = tiny_compatible(), qwen3_8b_from_32b_32xh100_fp8()
    assert (tiny.mismatch_limit, large.mismatch_limit) == (1e-3, 0.5)
    assert apply_overrides(tiny, ["survival.max_mismatch=0"]).mismatch_limit is None
    assert apply_overrides(tiny, ["survival.max_mismatch=0.02"]).mismatch_limit == 0.02


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.GateConfig().k = 3  # type: ignore[misc]


def test_tensor_parallel_size_defaults_to_all_ranks() -> None:
    assert c.ParallelConfig(tensor=None).tensor_size(4) == 4
    assert c.ParallelConfig(tensor=2).tensor_size(4) == 2


def test_exit_codes_tell_a_wrong_recipe_from_a_failed_check() -> None:
    assert (ConfigError.exit_code, UserError.exit_code) == (2, 1)
