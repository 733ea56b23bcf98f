"""Rewards of a step: who has one, what a failure does, and what is refused before any model is built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from prune_opd.config import RewardConfig
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe
from prune_opd.data.prompt import Prompt
from prune_opd.errors import ConfigError, UserError
from prune_opd.rollout.batch import Response, Rollouts
from prune_opd.rollout.reward import RewardModel

MODULE = """
def length(text, prompt):
    return len(text)

def fails_on_two(text, prompt):
    return {"1": 1, "3": float("nan")}[text]

def ends(text, prompt):
    raise SystemExit(0)

def huge(text, prompt):
    return 1e200

number = 3
"""


class Digits:
    """A tokenizer whose ids are their own text."""

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return ["".join(map(str, row)) for row in rows]


class Equals:
    name, size = "task", None

    def score(self, text: str, prompt: Prompt) -> bool:
        return text == prompt.answer


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return "python:my_rewards"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank: what it would tell the others stays as it is."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda given: None)


def rollouts(*responses: Response, answer: str | None = "1") -> Rollouts:
    return Rollouts(tuple(Prompt(7, (5,), answer, "task") for _ in responses), responses)


def model(config: RewardConfig, responses: int = 2) -> RewardModel:
    source: Any = Equals()
    return RewardModel(config, responses, Digits(), {"task": source})


GROUPS = ["reward.name=answer", "rollout.responses=2"]
DONE = Response((1,), finished=True)
WRONG = Response((2,), finished=True)
CUT = Response((1,), finished=False)


def test_a_right_answer_has_1_and_a_response_that_was_cut_has_no_reward() -> None:
    found = model(RewardConfig("answer", coef=0.5))(rollouts(DONE, WRONG, CUT, DONE))
    assert found.reward_B == (1, 0, None, 1)
    assert found.advantage_B == pytest.approx((0.5 / 2**0.5, -0.5 / 2**0.5, 0, 0))
    record = found.record()
    assert record == pytest.approx(
        {
            "reward": 2 / 3,
            "reward_std": (2 / 9) ** 0.5,
            "reward_scored": 0.75,
            "reward_equal_groups": 0.0,
            "reward_failed": 0,
        }
    )


def test_a_response_that_was_cut_is_scored_when_it_is_wanted() -> None:
    found = model(RewardConfig("answer", only_if_finished=False))(rollouts(DONE, CUT))
    assert found.reward_B == (1, 1) and found.advantage_B == (0, 0) and found.record()["reward_equal_groups"] == 1


def test_where_nothing_was_scored_the_mean_is_unknown_and_not_0() -> None:
    record = model(RewardConfig("answer"))(rollouts(CUT, CUT)).record()
    assert record["reward"] is None and record["reward_std"] is None and record["reward_scored"] == 0


def test_a_function_of_the_users_gets_text_and_prompt(module: str) -> None:
    found = model(RewardConfig(f"{module}:length", normalise="none"))(rollouts(Response((1, 2, 3), finished=True)))
    assert found.reward_B == (3.0,)


def test_a_reward_that_fails_is_counted_and_too_many_end_the_run(module: str) -> None:
    batch = rollouts(DONE, WRONG, Response((3,), finished=True), DONE)
    found = model(RewardConfig(f"{module}:fails_on_two", max_failed=0.5))(batch)
    assert found.reward_B == (1, None, None, 1) and found.record()["reward_failed"] == 2
    with pytest.raises(UserError) as refused:
        model(RewardConfig(f"{module}:fails_on_two", max_failed=0.4))(batch)
    few = rollouts(WRONG, *[CUT] * 9)  # one of ten, although none else was scored
    assert model(RewardConfig(f"{module}:fails_on_two", max_failed=0.1))(few).failed == 1
    assert str(refused.value) == (
        "reward.name = python:my_rewards:fails_on_two: 2 of 4 responses have failed, reward.max_failed = 0.4; the "
        "first: row 1, prompt 7 of task: KeyError: '2'; response '2'. Mend the function, or raise reward.max_failed"
    )


def test_a_function_that_ends_the_process_is_every_ranks_error(module: str) -> None:
    with pytest.raises(UserError, match=r"SystemExit: 0; mend the function"):
        model(RewardConfig(f"{module}:ends"))(rollouts(DONE, WRONG))


def test_a_number_that_no_loss_can_hold_is_a_failure(module: str) -> None:
    with pytest.raises(UserError, match=r"ValueError: the reward is 1e\+200, no number up to 1e\+06"):
        model(RewardConfig(f"{module}:huge"))(rollouts(DONE, WRONG))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("python:no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'; give the module as Python"),
        (
            "python:my_rewards:missing",
            "AttributeError: module 'my_rewards' has no attribute 'missing'; give the module",
        ),
        ("python:my_rewards:number", "is int and no function: name a function"),
    ],
)
def test_a_function_that_is_not_there_is_refused(module: str, name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        RewardConfig(name).function()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["reward.name=maths"], "reward.name = 'maths': give none, answer or python:MODULE:FUNCTION"),
        (["reward.name=python:module"], "give none, answer or python:MODULE:FUNCTION"),
        (["reward.name=answer", "reward.coef=0"], "reward.coef = 0"),
        (["reward.name=answer", "rollout.responses=1"], "reward.normalise = group and rollout.responses = 1"),
        (
            [*GROUPS, "rollout.temperature=0.7"],
            "with rollout.temperature = 0.7: a policy gradient",
        ),
        (
            [*GROUPS, "objective.temperature=2"],
            "with objective.temperature = 2: a policy gradient",
        ),
    ],
)
def test_settings_that_could_teach_nothing_are_refused(settings: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        apply_overrides(load_recipe("tiny_compatible"), settings)
