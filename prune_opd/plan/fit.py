"""Whether a recipe fits, and how large a micro-batch and a horizon may be with the rest of it as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from prune_opd.config import TrainConfig
from prune_opd.plan.memory import INFLIGHT, START, MemoryPlan, plan_memory
from prune_opd.plan.setting import Setting


def problems(setting: Setting, plan: MemoryPlan) -> list[str]:
    """Why the run does not fit, a line each."""
    found = []
    rollout = setting.config.rollout
    longest = rollout.max_prompt_len + setting.config.horizon.max_len
    if plan.cache_tokens < longest:
        found.append(
            f"rollout.gpu_memory_utilization = {rollout.gpu_memory_utilization} leaves a KV cache of "
            f"{max(plan.cache_tokens, 0):.0f} tokens beside the engine's weights, and one response may take {longest}: "
            "raise it, raise rollout.tensor_parallel, or quantise the rollouts"
        )
    if plan.peak > plan.limit:
        remedies = {
            START: "lower rollout.gpu_memory_utilization, set memory.offload_*, or share the models over more ranks",
            INFLIGHT: "lower rollout.gpu_memory_utilization, or raise parallel.teacher_tensor",
            "train": "raise parallel.tensor, set parallel.recompute=full, memory.* offloads, or more nodes",
            "teacher": "raise parallel.teacher_tensor, or set memory.offload_optimizer and memory.sleep_level",
        }
        remedy = remedies.get(plan.peak_phase.split()[0], "set memory.sleep_level and memory.offload_*")
        found.append(
            f"phase {plan.peak_phase} takes {plan.peak / 1e9:.1f} GB of the {plan.limit / 1e9:.1f} GB that a "
            f"{setting.gpu.name} leaves: {remedy}"
        )
    return found


def largest_fit(setting: Setting) -> tuple[int, int]:
    """The largest parallel.microbatch_tokens and horizon.max_len that fit, in multiples of 512 tokens; 0 if none does.

    The models' positions bound the horizon too.
    """
    config, teachers = setting.config, [one.teacher for one in setting.of.values() or (setting,)]
    positions = min(
        setting.student.max_positions - config.rollout.max_prompt_len,
        *(teacher.max_positions - config.teacher_prompt_limit for teacher in teachers),
    )

    def batch(config: TrainConfig, tokens: int) -> TrainConfig:
        return replace(config, parallel=replace(config.parallel, microbatch_tokens=tokens))

    def length(config: TrainConfig, tokens: int) -> TrainConfig:
        horizon = replace(config.horizon, max_len=tokens, min_len=min(config.horizon.min_len, tokens))
        return replace(config, horizon=horizon)

    return _largest(setting, batch, 2**20), _largest(setting, length, positions)


def _largest(plain: Setting, change: Callable[[TrainConfig, int], TrainConfig], most: int) -> int:
    low, high = 0, most // 512
    while low < high:
        middle = (low + high + 1) // 2
        setting = _changed(plain, change, 512 * middle)
        low, high = (low, middle - 1) if problems(setting, plan_memory(setting)) else (middle, high)
    return 512 * low


def _changed(setting: Setting, change: Callable[[TrainConfig, int], TrainConfig], tokens: int) -> Setting:
    of = {name: _changed(one, change, tokens) for name, one in setting.of.items()}
    return replace(setting, config=change(setting.config, tokens), of=of)
