"""What the tests of the comparison share: its recipe, and metrics as a run would leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prune_opd.config import TrainConfig
from prune_opd.config.recipe import load_recipe

SEEDS = [1001, 1002, 1003]


def recipe(pair: str = "tiny_compatible") -> TrainConfig:
    config = load_recipe(pair)
    assert isinstance(config, TrainConfig)
    return config


def write_metrics(path: Path, steps: int, horizon: int = 100, accuracy: float = 0.5) -> None:
    lines: list[dict[str, Any]] = [evaluation(0, 0.1)]
    lines += [step(number, horizon + number) for number in range(1, steps + 1)]
    path.write_text("\n".join(json.dumps(line) for line in [*lines, evaluation(steps, accuracy)]) + "\n")


def evaluation(number: int, accuracy: float) -> dict[str, Any]:
    return {"step": number, "eval_ledger": accuracy, "eval_ledger_stderr": 0.02, "eval_response_length": 150.0}


def step(number: int, horizon: int, tokens: int = 100, seconds: float = 1.0) -> dict[str, Any]:
    phases = ("sync", "rollout", "teacher", "train", "step")
    times = {f"{kind}_{phase}": seconds for kind in ("time", "cpu") for phase in phases}
    position = {"overlap": 0.8, "event_rate": 0.1, "overlap_by_position": [0.9, None]}
    return {
        "step": number,
        "horizon": horizon,
        "tokens_generated": tokens,
        "tokens_trained": tokens,
        "response_length": tokens / 10,
        "reliable_length": tokens / 10,
        **position,
        **times,
    }
