"""Memory and time of a plan move the way they must, the search finds what fits, and published figures are met."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from prune_opd.config import HorizonConfig, ParallelConfig, RolloutConfig, TrainConfig
from prune_opd.config import memory_phases as phases
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import list_recipes, load_recipe
from prune_opd.errors import ConfigError
from prune_opd.plan import search
from prune_opd.plan.fit import largest_fit, problems
from prune_opd.plan.hardware import STEP_OVERHEAD
from prune_opd.plan.memory import plan_memory
from prune_opd.plan.planner import Plan, curve, plan_run
from prune_opd.plan.search import best_layouts
from prune_opd.plan.setting import setting_of
from prune_opd.plan.show import digits
from prune_opd.plan.time import step_time, train_seconds
from tests.fake_models import train_config, write_model
from tests.plan import published

SMALL, SEVEN = "r1_1_5b_from_justrl_8xh100", "r1_7b_from_skywork_8xh100"
LARGE, EXPERTS = "qwen3_8b_from_32b_32xh100_fp8", "qwen3_30b_a3b_from_235b_a22b_128xh100_fp8"


def recipe(name: str, *overrides: str) -> TrainConfig:
    config = load_recipe(name)
    assert isinstance(config, TrainConfig)
    return apply_overrides(config, list(overrides))


def plan(name: str, *overrides: str, gpu: str = "h100", nodes: int | None = None) -> Plan:
    config = recipe(name, *overrides)
    return plan_run(config, gpu, nodes or config.planning.nodes)


# ---------------------------------------------------------------------------------------------------- published figures


@pytest.fixture(scope="module")
def rows() -> list[published.Row]:
    return published.comparison()


def test_every_published_figure_is_met_within_the_tolerance(rows: list[published.Row]) -> None:
    assert len(rows) == 15
    assert not [f"{row.what}: {row.error:+.0%}" for row in rows if not row.holds]


def test_savings_come_out_in_the_published_order() -> None:
    """Which pair saves most, and which next to nothing, does not depend on the planner's constants."""
    hours = {row.what: row.ours for row in published.pair_rows()}
    saved = {name: 1 - hours[f"{name}, Prune"] / hours[f"{name}, OPD"] for name in published.PAIRS}
    told = {name: 1 - pruned / full for name, (full, pruned) in published.PAIRS.items()}
    assert max(saved, key=saved.__getitem__) == max(told, key=told.__getitem__)
    assert min(saved, key=saved.__getitem__) == min(told, key=told.__getitem__)
    for name in saved:
        assert saved[name] == pytest.approx(told[name], abs=0.15)


def test_the_tables_of_the_docs_are_the_planners() -> None:
    docs = Path(__file__).parents[2] / "docs" / "planner.md"
    assert published.table() in docs.read_text(encoding="utf-8")
    assert published.strategies_table() in docs.read_text(encoding="utf-8")


def test_popd_lies_where_its_constants_put_it() -> None:
    """Its constants are not published: the test only holds the docs to the planner's two numbers."""
    docs = (Path(__file__).parents[2] / "docs" / "planner.md").read_text(encoding="utf-8")
    ours, slower = published.popd_hours(512, 8), published.popd_hours(256, 8)
    assert f"are {ours:.1f}, with 256 tokens every 8 steps {slower:.1f}" in docs
    assert slower < ours < published.TOPD_OPD


def test_the_overhead_is_the_fitted_one_of_every_published_run() -> None:
    """It shrinks only below what it was fitted to, whatever the strategy."""
    for name in published.PAIRS:
        for step in plan(name).steps.values():
            assert step.seconds["overhead"] == pytest.approx(STEP_OVERHEAD)


# ---------------------------------------------------------------------------------------------------- small models


def small(folder: Path, layers: int = 26, **changes: Any) -> TrainConfig:
    """The pair of SmolLM2-135M's shape in a run of a minute or two."""
    shape: dict[str, Any] = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536}
    shape |= {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
    models = [write_model(folder / f"{i}", num_hidden_layers=n, **shape) for i, n in enumerate((layers, 30))]
    horizon = HorizonConfig(strategy="prune", max_len=96, min_len=16, init_len=48)
    parallel = ParallelConfig(nproc=2, tensor=1)
    return train_config(*models, **({"horizon": horizon, "parallel": parallel, "steps": 20} | changes))


def test_the_overhead_of_a_small_model_is_small_and_grows_with_models_and_tokens(tmp_path: Path) -> None:
    """Of 30 s a step with two models of .1 B parameters and 8 responses of 96 tokens nothing else was to be seen."""
    step = plan_run(small(tmp_path / "a"), "h100", 1).planned.seconds["overhead"]
    assert 0 < step < 1.5
    rollout = RolloutConfig(prompts=64, responses=4)
    more_tokens = plan_run(small(tmp_path / "b", rollout=rollout), "h100", 1).planned.seconds["overhead"]
    longer = HorizonConfig(strategy="full", max_len=256, min_len=16)
    more_length = plan_run(small(tmp_path / "c", horizon=longer), "h100", 1).planned.seconds["overhead"]
    more_layers = plan_run(small(tmp_path / "d", layers=52), "h100", 1).planned.seconds["overhead"]
    assert min(more_tokens, more_length, more_layers) > step


def test_the_scaling_table_starts_at_the_recipes_own_gpus_and_has_them(tmp_path: Path) -> None:
    for nproc, nodes, first in ((2, 1, [2, 4, 8, 16]), (3, 1, [3, 6, 12, 24]), (8, 3, [8, 16, 24, 32, 48])):
        config = small(tmp_path / f"{nproc}", rollout=RolloutConfig(prompts=48, responses=4))
        config = apply_overrides(config, [f"parallel.nproc={nproc}", f"planning.nodes={nodes}"])
        assert list(curve(config, "h100", grow=True))[: len(first)] == first


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [(30.24, 1, "30.2"), (1.0, 1, "1.0"), (0.234, 1, "0.23"), (0.0021, 1, "0.0021"), (0.0, 1, "0.0"),
     (1e-9, 1, "0.0000"), (0.434, 0, "0.43"), (3.21, 0, "3.2"), (45.7, 0, "46"),
     (0.0123, 2, "0.012"), (1.234, 2, "1.23")],
)  # fmt: skip
def test_small_numbers_have_digits_and_large_ones_no_more_than_before(value: float, decimals: int, text: str) -> None:
    assert digits(value, decimals) == text


# ---------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "override", ["horizon.max_len=31000", "parallel.microbatch_tokens=65536", "parallel.recompute=none"]
)
def test_training_takes_more_memory_with(override: str) -> None:
    less, more = plan(SMALL).memory, plan(SMALL, override).memory
    assert more.total("train") > less.total("train")


def test_our_own_kernels_leave_the_loss_with_less_memory() -> None:
    plain, ours = (plan(SMALL, f"objective.kernels={kernels}").memory for kernels in ("torch", "triton"))
    assert ours.total("train") < plain.total("train")
    assert ours.total("rollout") == plain.total("rollout")


@pytest.mark.parametrize(
    ("part", "override"),
    [
        (phases.STUDENT, "parallel.tensor=1"),
        (phases.GRADIENTS, "parallel.tensor=1"),
        (phases.OPTIMIZER, "parallel.distributed_optimizer=false"),
        (phases.TEACHER, "parallel.teacher_tensor=1"),
        (phases.ROLLOUT_WEIGHTS, "precision.params=fp32"),
        (phases.KV_CACHE, "rollout.gpu_memory_utilization=0.6"),
    ],
)
def test_a_part_grows_with(part: str, override: str) -> None:
    overrides = [override]
    if "parallel.tensor" in override:
        overrides.append("parallel.sequence_parallel=false")
    assert plan(SEVEN, *overrides).memory.parts[part] > plan(SEVEN).memory.parts[part]


def test_offloading_follows_the_schedule_of_the_memory_phases() -> None:
    stay = plan(SEVEN, "memory.sleep_level=0", "memory.offload_gradients=false").memory
    move = plan(SEVEN, "memory.offload_teacher=true", "memory.offload_optimizer=true").memory
    engine = stay.parts[phases.ROLLOUT_WEIGHTS] + stay.parts[phases.KV_CACHE]
    assert stay.resident["train"] == stay.resident["rollout"] == sum(stay.parts.values())
    assert move.resident["train"] == pytest.approx(sum(move.parts.values()) - engine - move.parts[phases.TEACHER])
    assert move.resident["rollout"] == pytest.approx(engine + move.parts[phases.STUDENT])


def test_fp8_rollouts_halve_the_engines_weights_and_its_cache() -> None:
    bf16, fp8 = plan(SEVEN).memory, plan(SEVEN, "rollout.quantization=fp8", "rollout.kv_cache_dtype=fp8").memory
    assert fp8.parts[phases.ROLLOUT_WEIGHTS] == bf16.parts[phases.ROLLOUT_WEIGHTS] / 2
    assert fp8.cache_tokens > 2 * bf16.cache_tokens


def test_what_does_not_fit_is_named_with_its_phase_and_a_remedy() -> None:
    whole = plan(SEVEN, "parallel.tensor=1", "parallel.sequence_parallel=false", "parallel.distributed_optimizer=false")
    (line,) = whole.problems
    assert line.startswith(f"phase {whole.memory.peak_phase} takes") and "raise parallel.tensor" in line
    (line,) = plan(SEVEN, "rollout.gpu_memory_utilization=0.21").problems
    assert "rollout.gpu_memory_utilization = 0.21 leaves a KV cache of" in line


def test_the_largest_that_fits_fits_and_the_next_does_not() -> None:
    found = plan(SEVEN)
    tokens, length = largest_fit(found.setting)
    for key, value in (("parallel.microbatch_tokens", tokens), ("horizon.max_len", length)):
        assert not plan(SEVEN, f"{key}={value}").problems
    assert plan(SEVEN, f"parallel.microbatch_tokens={tokens + 512}").problems
    assert length <= 131072 - 1024


# ---------------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize(
    ("phase", "override"),
    [
        ("rollout", "rollout.prompts=128"),
        ("rollout", "planning.response_length=9000"),
        ("teacher", "rollout.prompts=128"),
        ("train", "rollout.prompts=128"),
        ("train", "planning.response_length=9000"),
    ],
)
def test_a_phase_takes_longer_with(phase: str, override: str) -> None:
    assert plan(SMALL, override).full.seconds[phase] > plan(SMALL).full.seconds[phase]


def test_without_recompute_training_is_faster() -> None:
    assert plan(SMALL, "parallel.recompute=none").full.seconds["train"] < plan(SMALL).full.seconds["train"]


def test_a_shorter_horizon_and_a_faster_gpu_take_less_time() -> None:
    slow, fast = plan(SMALL, gpu="a100"), plan(SMALL)
    assert fast.planned.total < fast.full.total < slow.full.total
    assert fast.gpu_hours(fast.planned) < fast.gpu_hours(fast.full)


def test_a_larger_teacher_takes_the_teacher_longer_and_nothing_else_but_its_head() -> None:
    small, large = plan(SMALL), plan("r1_1_5b_from_r1_7b_8xh100", "planning.response_length=5500")
    assert large.full.seconds["teacher"] > 3 * small.full.seconds["teacher"]
    assert large.full.seconds["rollout"] == small.full.seconds["rollout"]


def test_an_engine_whose_cache_is_small_decodes_in_turns() -> None:
    wide = plan(SMALL, "rollout.prompts=512")
    narrow = plan(SMALL, "rollout.prompts=512", "rollout.max_num_seqs=8")
    assert narrow.full.seconds["rollout"] > 2 * wide.full.seconds["rollout"]


def test_with_a_growing_batch_only_what_links_the_gpus_grows() -> None:
    steps = curve(recipe(LARGE), "h100", grow=True)
    assert list(steps) == [8, 16, 32, 64, 128, 256, 512, 1024]
    small, large = steps[32].seconds, steps[1024].seconds
    assert large["sync"] > small["sync"] and large["all-reduce"] > small["all-reduce"]
    for phase in ("rollout", "train"):
        assert large[phase] == pytest.approx(small[phase], rel=0.02)


def test_with_a_fixed_batch_gpu_hours_grow_and_the_longest_response_remains() -> None:
    config = recipe(LARGE)
    steps = curve(config, "h100", grow=False)
    cost = [step.total * gpus for gpus, step in steps.items()]
    assert cost == sorted(cost)
    assert steps[1024].longest == "rollout"
    assert steps[1024].seconds["rollout"] > config.planning.mean_horizon * 0.002  # no step is shorter than its overhead


# ---------------------------------------------------------------------------------------------------- search


def test_the_search_names_layouts_that_fit_and_are_no_slower() -> None:
    config = recipe(SEVEN)
    own = plan_run(config, "h100", 1)
    found = best_layouts(config, "h100", 1, count=3)
    assert len(found) == 3
    assert found[0].seconds <= own.planned.total
    for layout in found:
        again = plan_run(apply_overrides(config, list(layout.overrides)), "h100", 1)
        assert not again.problems
        assert math.isclose(again.planned.total, layout.seconds)


def test_the_search_looks_at_virtual_pipelines_and_context_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual pipeline shortens the idle ends of a pipeline with experts; rows that are longer than a micro-batch's
    share of a rank need recompute, unless ranks share them."""
    small = "parallel.microbatch_tokens=8192"
    searches = ((recipe(EXPERTS), 16, "virtual_pipeline"), (recipe(SEVEN, small), 1, "context"))
    best = [best_layouts(config, "h100", nodes, count=1)[0] for config, nodes, _ in searches]
    monkeypatch.setattr(search, "CHUNKS", (1,))
    monkeypatch.setattr(search, "CONTEXTS", (1,))
    for (config, nodes, size), found in zip(searches, best, strict=True):
        assert f"parallel.{size}=1" not in found.overrides
        assert found.seconds < best_layouts(config, "h100", nodes, count=1)[0].seconds


def test_the_search_finds_a_layout_where_the_recipes_own_does_not_fit() -> None:
    overrides = ("parallel.tensor=1", "parallel.sequence_parallel=false", "rollout.gpu_memory_utilization=0.7")
    config = recipe(SEVEN, *overrides)
    assert plan_run(config, "h100", 1).problems
    assert best_layouts(config, "h100", 1, count=1)


def test_the_search_comes_back_empty_where_nothing_fits() -> None:
    assert best_layouts(recipe(EXPERTS), "a100", 1, count=1) == []


# ---------------------------------------------------------------------------------------------------- strategies


def test_a_plan_has_the_strategies_side_by_side_with_the_recipes_own_first() -> None:
    steps = plan(SMALL).steps
    assert list(steps) == ["prune", "popd", "topd", "full"]
    assert steps["topd"].total < steps["popd"].total < steps["full"].total
    own = plan(SMALL, "horizon.strategy=popd", "horizon.rho=null")
    assert list(own.steps) == ["popd", "prune", "full"]  # nothing is known of topd
    assert own.planned == steps["popd"]


def test_a_growing_horizon_takes_the_mean_of_its_own_steps() -> None:
    """Eight steps at 1024 tokens, eight at 1536: their mean time is not that of a step at the mean horizon."""
    planned = plan(SMALL, "horizon.strategy=popd", "steps=16")
    step, cache = planned.planned, planned.memory.cache_tokens
    short, long = (step_time(planned.setting, tokens, cache) for tokens in (1024, 1536))
    assert step.horizon == 1280
    assert step.total == pytest.approx((short.total + long.total) / 2)
    assert step.tokens == pytest.approx((short.tokens + long.tokens) / 2)
    assert abs(step.tokens / step_time(planned.setting, 1280, cache).tokens - 1) > 1e-4


def test_stages_and_context_ranks_cost_their_messages() -> None:
    """If one link is ten times as slow, only the layouts that send something over it take longer."""
    alone = ("parallel.tensor=1", "parallel.sequence_parallel=false", "parallel.teacher_tensor=1")
    for size in ("parallel.pipeline=2", "parallel.context=2"):
        own = (*alone, size, "parallel.teacher_pipeline=1", "steps=1")
        fast = setting_of(recipe(SMALL, *own), "h100", 1)
        slow = dataclasses.replace(fast, gpu=dataclasses.replace(fast.gpu, nvlink=fast.gpu.nvlink / 10))
        seconds = [train_seconds(setting, [4000.0] * 64) for setting in (fast, slow)]
        assert seconds[1] > seconds[0]
    fast = setting_of(recipe(SMALL, *alone), "h100", 1)
    slow = dataclasses.replace(fast, gpu=dataclasses.replace(fast.gpu, nvlink=fast.gpu.nvlink / 10))
    assert train_seconds(fast, [4000.0] * 64) == train_seconds(slow, [4000.0] * 64)


# ---------------------------------------------------------------------------------------------------- recipes, refusals


@pytest.mark.parametrize("name", [name for name in list_recipes() if "h100" in name])
@pytest.mark.parametrize("strategy", ["prune", "full", "topd", "popd"])
def test_every_gpu_recipe_fits_with_each_strategy(name: str, strategy: str) -> None:
    assert plan(name, f"horizon.strategy={strategy}").problems == ()


def test_a_cpu_is_refused_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match=r"gpu = 'cpu' cannot be planned.*run the recipe.*--gpu"):
        plan_run(recipe(SMALL), "cpu", 1)
    with pytest.raises(ConfigError, match=r"gpu = 'v100' is not known: choose one of a100, h100, h200"):
        plan_run(recipe(SMALL), "v100", 1)


def test_a_model_that_is_neither_there_nor_published_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"student = 'some/where': there is no config.json in it"):
        setting_of(recipe(SMALL, "student=some/where"), "h100", 1)


def test_a_layout_that_does_not_divide_the_ranks_is_a_problem_of_the_plan() -> None:
    assert any("does not divide" in line for line in plan(SMALL, "parallel.tensor=8").problems)


def test_the_parts_of_a_plan_stay_within_the_gpu() -> None:
    setting = setting_of(recipe(EXPERTS), "h100", 16)
    memory = plan_memory(setting)
    assert problems(setting, memory) == []
    assert 0 < memory.peak <= memory.limit < setting.gpu.memory
