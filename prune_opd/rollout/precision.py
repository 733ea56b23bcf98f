"""Number formats of the rollouts, as arguments of vLLM."""

from __future__ import annotations

from typing import Any

from prune_opd.config import RolloutConfig


def rollout_arguments(rollout: RolloutConfig, sleep_level: int = 0) -> dict[str, Any]:
    """Of vLLM's `EngineArgs` (and `LLM`). sleep_level: that of the engine; 0: it will not be put to sleep."""
    return {
        "quantization": rollout.quantization,
        "kv_cache_dtype": rollout.kv_cache_dtype,
        "enable_sleep_mode": sleep_level > 0,
    }


def rollout_format(params: str, rollout: RolloutConfig) -> str:
    """fp32, bf16 or fp8: the coarsest format that the rollouts are computed in."""
    return params if rollout.quantization is None and rollout.kv_cache_dtype == "auto" else "fp8"
