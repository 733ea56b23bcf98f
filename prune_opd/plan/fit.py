"""How large a micro-batch and a horizon may be, the rest of the recipe as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from prune_opd.plan.memory import plan_memory, problems
from prune_opd.plan.setting import Setting


def largest_fit(setting: Setting) -> tuple[int, int]:
    """The largest parallel.microbatch_tokens and horizon.max_len that fit, in multiples of 512 tokens; 0 if none does.

    The models' positions bound the horizon too.
    """
    config = setting.config
    positions = min(
        setting.student.max_positions - config.rollout.max_prompt_len,
        setting.teacher.max_positions - config.teacher_prompt_limit,
    )

    def batch(tokens: int) -> Setting:
        return replace(setting, config=replace(config, parallel=replace(config.parallel, microbatch_tokens=tokens)))

    def length(tokens: int) -> Setting:
        horizon = replace(config.horizon, max_len=tokens, min_len=min(config.horizon.min_len, tokens))
        return replace(setting, config=replace(config, horizon=horizon))

    return _largest(batch, 2**20), _largest(length, positions)


def _largest(make: Callable[[int], Setting], most: int) -> int:
    low, high = 0, most // 512
    while low < high:
        middle = (low + high + 1) // 2
        setting = make(512 * middle)
        low, high = (low, middle - 1) if problems(setting, plan_memory(setting)) else (middle, high)
    return 512 * low
