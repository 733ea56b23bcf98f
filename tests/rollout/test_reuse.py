"""Rollouts that serve several steps: in which order, how old they are, what a checkpoint holds, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prune_opd.config import HorizonConfig, InflightConfig, ObjectiveConfig, RolloutConfig
from prune_opd.errors import ConfigError, UserError
from prune_opd.rollout.batch import Group, Response, Rollouts
from prune_opd.rollout.long_tail import LongTail
from prune_opd.rollout.phase import RolloutPhase
from prune_opd.run import Run
from tests.fake_models import train_config
from tests.rollout.test_long_tail import Numbers, prompt, response

REUSE = RolloutConfig(prompts=2, responses=2, refresh_every=3)
ON = InflightConfig(mode="gate", first_check=8)
PARTIAL = RolloutConfig(prompts=2, responses=2, oversample=1.5, partial=True)
POPD = HorizonConfig(strategy="popd", max_len=32, min_len=1, init_len=4, increment=4, interval=1)
MOVING = HorizonConfig(strategy="prune", max_len=32, min_len=1, init_len=4)


class Engine:
    """Generates responses of as many tokens as the number of the prompt, of at least one."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def generate(self, rows: Any, sampling: Any, race: Any, watch: Any) -> Rollouts:
        assert race is None and watch is None and sampling.logprobs
        self.asked.append([row.prompt.index for row in rows])
        return Rollouts(tuple(row.prompt for row in rows), tuple(response(max(row.prompt.index, 1)) for row in rows))


def phase(settings: RolloutConfig, steps: int) -> tuple[RolloutPhase, Engine]:
    here, engine, sampler = Path("."), Engine(), Numbers()
    horizon = HorizonConfig(strategy="full", max_len=32, min_len=1)
    config = train_config(here, here, rollout=settings, steps=steps, horizon=horizon)
    return RolloutPhase(config, engine, sampler), engine  # type: ignore[arg-type]


def test_a_refresh_generates_for_the_steps_until_the_next_one_and_they_take_it_in_order() -> None:
    rollout, engine = phase(REUSE, steps=5)
    seen = [rollout.generate(32, step) for step in range(1, 6)]
    drawn = [[p.index for p in batch.prompts[::2]] for batch in seen]
    assert drawn == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]  # as on-policy: each prompt once, in the sampler's order
    assert [len(asked) for asked in engine.asked] == [12, 8]  # the second time for two steps: the run ends there
    assert [batch.generated for batch in seen] == [2 * (1 + 1 + 2 + 3 + 4 + 5), 0, 0, 2 * (6 + 7 + 8 + 9), 0]
    assert [batch.generated == 0 for batch in seen] == [False, True, True, False, True]
    assert [batch.tokens for batch in seen] == [4, 10, 18, 26, 34]
    assert all(r.stale == len(r.ids) for batch in seen for r in batch.responses if batch.generated == 0)
    assert all(r.logprobs and r.stale == 0 for r in seen[0].responses)


def test_the_age_of_the_rollouts_is_in_the_record() -> None:
    rollout, _ = phase(REUSE, steps=9)
    ages = []
    for step in range(1, 6):
        batch = rollout.generate(32, step)
        record = rollout.long_tail.record(batch)
        assert record["stale_tokens"] == (batch.tokens if record["rollout_age"] else 0)
        ages.append(record["rollout_age"])
    assert ages == [0, 1, 2, 0, 1]


def test_once_is_the_initial_student_for_all_steps_and_then_an_error() -> None:
    rollout, engine = phase(dataclasses.replace(REUSE, refresh_every=0), steps=4)
    for step in range(1, 5):
        assert (rollout.generate(32, step).generated == 0) == (step > 1)
    assert [len(asked) for asked in engine.asked] == [16]
    with pytest.raises(UserError, match=r"rollout\.refresh_every = 0 and the initial student's rollouts are used up"):
        rollout.generate(32, 5)


def test_a_checkpoint_between_two_refreshes_goes_on_with_the_same_rollouts() -> None:
    whole, _ = phase(REUSE, steps=6)
    stopped, _ = phase(REUSE, steps=6)
    expected = [whole.generate(32, step) for step in range(1, 4)]
    stopped.generate(32, 1)
    again, engine = phase(REUSE, steps=6)
    again.long_tail.load_state_dict(json.loads(json.dumps(stopped.long_tail.state_dict())))
    assert [again.generate(32, step) for step in (2, 3)] == expected[1:] and engine.asked == []
    assert again.long_tail.age == whole.long_tail.age == 2


def test_reuse_is_refused_with_what_belongs_to_one_step() -> None:
    here = Path(".")
    full = HorizonConfig(strategy="full", max_len=32, min_len=1)
    for rollout, more, text in (
        (RolloutConfig(refresh_every=2, oversample=1.5), {}, r"refresh_every = 2 with rollout\.oversample = 1\.5"),
        (
            RolloutConfig(refresh_every=2, inflight=ON),
            {},
            r"inflight\.mode = gate",
        ),
        (RolloutConfig(refresh_every=0), {"horizon": MOVING}, r"horizon\.strategy = prune"),
        (RolloutConfig(refresh_every=2), {"horizon": POPD}, r"refresh_every = 2 with horizon\.strategy = popd"),
        (RolloutConfig(refresh_every=0), {"objective": ObjectiveConfig(temperature=0.7)}, r"objective\.temperature"),
    ):
        with pytest.raises(ConfigError, match=text):
            train_config(here, here, **{"rollout": rollout, "horizon": full} | more)
    train_config(here, here, rollout=RolloutConfig(refresh_every=2), horizon=MOVING)
    with pytest.raises(ConfigError, match=r"rollout\.refresh_every"):
        RolloutConfig(refresh_every=-1)


@pytest.mark.parametrize(
    "before", (dataclasses.replace(REUSE, responses=4), dataclasses.replace(REUSE, prompts=4), PARTIAL), ids=str
)
def test_what_waits_under_other_settings_is_generated_anew_and_no_prompt_is_lost(before: RolloutConfig) -> None:
    tail = LongTail(before)
    whole = Response((1,) * 5, finished=True, logprobs=(0.0,) * 5, stale=5)
    tail.waiting = [Group(prompt(i), (whole,) * before.responses) for i in range(4)]
    again, engine = phase(REUSE, steps=6)
    again.long_tail.load_state_dict(json.loads(json.dumps(tail.state_dict())))
    drawn = [[p.index for p in again.generate(32, step).prompts[::2]] for step in range(4, 7)]
    assert drawn == [[0, 1], [2, 3], [0, 1]] and len(engine.asked) == 1  # the sampler of this test begins at 0 again


@pytest.mark.parametrize(("age", "moved"), ((0, 1), (1, 0)))
def test_the_window_moves_with_a_steps_own_rollouts_though_none_of_their_tokens_be_fresh(age: int, moved: int) -> None:
    """Partial rollouts may all have ended in the step before: they are no reused ones."""
    seen: list[str] = []
    controller = SimpleNamespace(update=lambda *_: seen.append("controller"))
    calibration = SimpleNamespace(update=lambda *_: seen.append("calibration"))
    run: Any = SimpleNamespace(
        controller=controller, calibration=calibration, rollout=SimpleNamespace(long_tail=SimpleNamespace(age=age))
    )
    stats: Any = SimpleNamespace(reliable_length_B=None, early=torch.zeros(1), early_kl=torch.zeros(()))
    stale = Rollouts((prompt(0),), (Response((1, 1), finished=True, logprobs=(0.0, 0.0), stale=2),))
    Run.move_window(run, stats, stale)
    assert seen == ["controller"] * moved + ["calibration"]
