"""Ranks of test_reward_ranks.py: a step's rewards, and rewards that fail on the rank that scores.

    torchrun … worker_reward.py OUT

Every rank writes OUT/rank<number>.json: what each of the functions below came to.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from prune_opd.config import RewardConfig
from prune_opd.data.prompt import Prompt
from prune_opd.errors import UserError
from prune_opd.rollout.batch import Response, Rollouts
from prune_opd.rollout.reward import RewardModel


class Digits:
    """A tokenizer whose ids are their own text."""

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return ["".join(map(str, row)) for row in rows]


def of_this_rank(text: str, prompt: Prompt) -> float:
    """What no two ranks agree on."""
    return int(text) + 100 * int(os.environ["RANK"])


def raises(text: str, prompt: Prompt) -> float:
    raise ValueError(f"no reward for {text}")


def ends(text: str, prompt: Prompt) -> float:
    sys.exit(0)


class Broken(Digits):
    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        raise MemoryError("too many texts")


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rollouts = Rollouts(
        (Prompt(0, (5,), None, "task"),) * 4, tuple(Response((number,), finished=True) for number in range(1, 5))
    )
    found: dict[str, Any] = {}
    for name in ("of_this_rank", "raises", "ends", "broken"):
        tokenizer, function = (Broken(), "raises") if name == "broken" else (Digits(), name)
        config = RewardConfig(name=f"python:tests.distributed.worker_reward:{function}", max_failed=0.0)
        try:
            rewards = RewardModel(config, 2, tokenizer, {})(rollouts)
            found[name] = [rewards.reward_B, rewards.advantage_B]
        except UserError as error:
            found[name] = str(error)
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
