"""What a task's reward asks of prompt files: answers, and one way to score them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe
from prune_opd.data.prompts import make_sampler
from prune_opd.errors import ConfigError
from prune_opd.rollout.batch import Response, Rollouts
from prune_opd.rollout.reward import make_reward

REWARD = ("reward.name=answer", "rollout.responses=2")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank: what it would tell the others stays as it is."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda given: None)


def test_rows_without_answers_are_refused_before_a_model_is_built(tmp_path: Path, byte_tokenizer: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ({"prompt": "a", "answer": "1"}, {"prompt": "b"})))
    config = apply_overrides(load_recipe("tiny_compatible"), [f"data.source={file}", *REWARD])
    sampler = make_sampler(config.data, byte_tokenizer, 0)
    with pytest.raises(
        ConfigError, match=r'rows\.jsonl:2: 1 of 2 rows have no "answer", so a response cannot be scored'
    ):
        make_reward(config, byte_tokenizer, sampler)
    assert make_reward(apply_overrides(config, ["reward.name=none"]), byte_tokenizer, sampler) is None


def test_rows_are_scored_as_mathematics_whatever_they_call_their_source(tmp_path: Path, byte_tokenizer: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "a", "answer": "1/2", "source": "aime"}) + "\n")
    config = apply_overrides(load_recipe("tiny_compatible"), [f"data.source={file}", *REWARD])
    sampler = make_sampler(config.data, byte_tokenizer, 0)
    reward, (prompt,) = make_reward(config, byte_tokenizer, sampler), sampler.next(1)
    assert reward is not None and prompt.source == "aime"
    texts = (r"\boxed{0.5}", r"\boxed{2}")
    answers = tuple(Response(tuple(byte_tokenizer.encode(text)), finished=True) for text in texts)
    assert reward(Rollouts((prompt, prompt), answers)).reward_B == (1, 0)
