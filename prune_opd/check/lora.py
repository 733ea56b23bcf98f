"""What adapters cannot have: experts, weights that are kept in FP8, more rows than a matrix."""

from __future__ import annotations

from typing import Any

from prune_opd.config import TrainConfig
from prune_opd.config.lora import FEED_FORWARD


def lora_problems(config: TrainConfig, model: dict[str, Any] | None) -> list[str]:
    """Why this student cannot have the adapters, a line each. model: its config.json, None if it cannot be read."""
    lora, problems = config.lora, []
    if not lora.on:
        return []
    if config.precision.student_fp8.param:
        problems.append(
            "precision.student_fp8.param = True with lora.rank > 0: adapters are merged into bf16 weights for the "
            "rollouts, and there are none; set precision.student_fp8.param=false"
        )
    if model is None:
        return problems
    named = [target for target in lora.targets if target in FEED_FORWARD]
    if model.get("model_type") == "qwen3_moe" and named:
        others = [target for target in lora.targets if target not in FEED_FORWARD] or ["linear_qkv", "linear_proj"]
        problems.append(
            f"lora.targets has {' and '.join(named)}, and the student has experts, whose layers get no adapters: set "
            f"lora.targets=[{','.join(others)}]"
        )
    if lora.rank > (most := int(model["hidden_size"])):
        problems.append(
            f"lora.rank = {lora.rank} is above hidden_size = {most} of the student, where adapters have more numbers "
            f"than the matrices themselves: set at most {most}, or 0 to train every weight"
        )
    return problems
