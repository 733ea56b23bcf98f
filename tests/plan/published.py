"""The planner beside published figures: what docs/planner.md tabulates and a test holds within TOLERANCE.

The papers' set-ups are the recipes of this repository on eight GPUs of 80 GB. Which GPU they had is not in what we have
of them; A100s are assumed, since an H100 at the same efficiencies would take about half the hours. The papers ran other
software (verl), so this tests the arithmetic of models, lengths and horizons, not this project's own speed.

What is an input here and not a prediction: the mean response length of each pair, and for three pairs the mean window
(`planning.*` in their recipes): the papers do not give them, and they were chosen with the hours in view. The windows
of the JustRL and the Skywork pair follow their published curves; fixed 4K and TOPD have no window to assume.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from prune_opd.config import HorizonConfig, MemoryConfig, ParallelConfig, PlanningConfig, RolloutConfig, TrainConfig
from prune_opd.config.paths import models_dir
from prune_opd.config.recipe import load_recipe
from prune_opd.plan.memory import STEP
from prune_opd.plan.planner import plan_run

TOLERANCE = 0.35
GPU = "a100"
PAIRS = {  # recipe: hours of OPD and of Prune with the overlap gate (Prune-OPD, arXiv 2605.07804, table 1)
    "r1_1_5b_from_justrl_8xh100": (6.9, 4.1),
    "r1_1_5b_from_r1_7b_8xh100": (12.5, 4.0),
    "qwen3_1_7b_base_from_4b_8xh100": (16.5, 10.3),
    "qwen3_4b_base_from_4b_8xh100": (28.5, 13.5),
    "r1_7b_from_skywork_8xh100": (17.5, 17.0),
}
JUSTRL = "r1_1_5b_from_justrl_8xh100"
FIXED_4K = 4.8  # hours, JustRL pair, same table
# arXiv 2605.31490: hours of the JustRL pair at up to 15360 tokens. Batch and steps are not in what we have of it: 1024
# responses a step and 9500 tokens a response are assumed, and the steps are those that make OPD's hours come out, so
# only the two others are predictions. POPD's (10.1 h) are none: its constants are not published.
TOPD_OPD, TOPD = 29.7, {0.25: 10.2, 0.10: 5.3}
# NVIDIA NeMo-RL's nightly test distillation-qwen3-32b-to-1.7b-base-1n8g-megatron-tp2pp2cp2-pack: 32 prompts × 1, up to
# 8192 tokens; what is not needed is taken to be offloaded, and 1500 tokens a response are assumed. Bounds, not
# measurements; the version of the test that we could read bounds a step by 500 s.
NEMO_SECONDS, NEMO_BYTES = 50, 75e9


@dataclass(frozen=True)
class Row:
    """assumed: what beside the constants went into `ours`. unit: h | s | GB. bound: published is an upper bound."""

    what: str
    published: float
    ours: float
    unit: str
    assumed: str
    bound: bool = False

    @property
    def error(self) -> float:
        return self.ours / self.published - 1

    @property
    def holds(self) -> bool:
        return self.error <= 0 if self.bound else abs(self.error) <= TOLERANCE


def comparison() -> list[Row]:
    return [*pair_rows(), *topd_rows(), *nemo_rows()]


def pair_rows() -> list[Row]:
    rows = []
    for name, (full, pruned) in PAIRS.items():
        config = _recipe(name)
        published_curve = name in (JUSTRL, "r1_7b_from_skywork_8xh100")
        rows.append(Row(f"{name}, OPD", full, _hours(_with(config, strategy="full")), "h", "response length"))
        if name == JUSTRL:
            fixed = _with(config, strategy="topd", rho=4096 / config.horizon.max_len)
            rows.append(Row(f"{name}, fixed 4K", FIXED_4K, _hours(fixed), "h", "response length"))
        assumed = "response length" if published_curve else "response length, window"
        rows.append(Row(f"{name}, Prune", pruned, _hours(config), "h", assumed))
    return rows


def topd_rows(prompts: int = 256) -> list[Row]:
    return [
        Row(f"JustRL pair, TOPD {rho}", hours, _truncated_hours(prompts, strategy="topd", rho=rho), "h",
            "batch, steps, response length")
        for rho, hours in TOPD.items()
    ]  # fmt: skip


def popd_hours(increment: int, interval: int) -> float:
    """The JustRL pair with a horizon that grows by `increment` tokens every `interval` steps."""
    return _truncated_hours(256, strategy="popd", increment=increment, interval=interval)


def _truncated_hours(prompts: int, **horizon: object) -> float:
    """In the set-up of arXiv 2605.31490, as far as it is assumed above."""
    config = _recipe(JUSTRL)
    config = replace(
        config,
        rollout=replace(config.rollout, prompts=prompts, responses=4),
        planning=replace(config.planning, response_length=9500),
        horizon=replace(config.horizon, max_len=15360),
    )
    return TOPD_OPD / _hours(_with(config, strategy="full")) * _hours(_with(config, **horizon))


def nemo_rows() -> list[Row]:
    config = TrainConfig(
        name="nemo_rl",
        student=str(models_dir() / "Qwen/Qwen3-1.7B-Base"),
        teacher=str(models_dir() / "Qwen/Qwen3-32B"),
        steps=10,
        horizon=HorizonConfig(strategy="full", max_len=8192 - 1024),
        gate=None,
        rollout=RolloutConfig(prompts=32, responses=1, max_prompt_len=1024, gpu_memory_utilization=0.6),
        parallel=ParallelConfig(
            nproc=8, tensor=2, pipeline=2, context=2, teacher_tensor=4, teacher_pipeline=2, distributed_optimizer=True
        ),
        memory=MemoryConfig(
            sleep_level=1, offload_student=True, offload_gradients=True, offload_optimizer=True, offload_teacher=True
        ),
        planning=PlanningConfig(gpu="h100", response_length=1500),
    )
    plan = plan_run(config, "h100", 1)
    peak = max(plan.memory.total(phase) for phase in STEP)  # it builds its engine on empty GPUs
    return [
        Row("Qwen3-1.7B ← 32B, a step", NEMO_SECONDS, plan.full.total, "s", "response length", bound=True),
        Row("Qwen3-1.7B ← 32B, peak", NEMO_BYTES / 1e9, peak / 1e9, "GB", "", bound=True),
    ]


def table() -> str:
    """The comparison as a Markdown table, as docs/planner.md has it."""
    lines = ["| | published | planned | error | assumed |", "|---|--:|--:|--:|---|"]
    for row in comparison():
        sign = "< " if row.bound else ""
        error = "holds" if row.bound and row.holds else f"{row.error:+.0%}"
        lines.append(
            f"| {row.what} | {sign}{row.published:g} {row.unit} | {row.ours:.1f} {row.unit} | {error} | {row.assumed} |"
        )
    return "\n".join(lines)


def strategies_table() -> str:
    """Hours of each pair by strategy, as docs/planner.md has them: all with the constants of the recipes."""
    names = {"full": "OPD", "popd": "POPD", "topd": "TOPD .25", "prune": "Prune"}
    lines = ["| | " + " | ".join(names.values()) + " |", "|---|" + "--:|" * len(names)]
    for pair in PAIRS:
        config = _recipe(pair)
        hours = " | ".join(f"{_hours(_with(config, strategy=strategy)):.1f}" for strategy in names)
        lines.append(f"| {pair} | {hours} |")
    return "\n".join(lines)


def _recipe(name: str) -> TrainConfig:
    config = load_recipe(name)
    assert isinstance(config, TrainConfig)
    return config


def _with(config: TrainConfig, **horizon: object) -> TrainConfig:
    return replace(config, horizon=replace(config.horizon, **horizon))  # type: ignore[arg-type]


def _hours(config: TrainConfig) -> float:
    """Of all steps, without evaluations: training time is what the papers give."""
    return plan_run(config, GPU, 1).planned.total * config.steps / 3600
