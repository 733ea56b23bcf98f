"""The long tail: which rows start first, on which engine; which groups are kept; what goes on in the next step."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_opd.config import DataConfig, ObjectiveConfig, RolloutConfig
from prune_opd.config.teachers import TeacherConfig
from prune_opd.data.prompt import Prompt
from prune_opd.errors import ConfigError
from prune_opd.rollout.batch import Group, Response, Rollouts
from prune_opd.rollout.long_tail import LongTail, Race, begun_rows, deal_to_engines, started_prompts, taught_by
from prune_opd.rollout.request import new_rows
from prune_opd.rollout.stepwise import RACE_GAP
from tests.distributed.ranks import read_ranks, run_ranks
from tests.distributed.tiny_run import write_pair
from tests.fake_models import train_config
from tests.rollout.worker_long_tail import KEEP, LIMITS, RESPONSES, STALE

SETTINGS = RolloutConfig(prompts=4, responses=2, oversample=1.5, partial=True)


class Numbers:
    """A sampler of prompts 0, 1, 2 … with three distinct texts."""

    endless = False

    def __init__(self) -> None:
        self.drawn = 0

    def next(self, n: int) -> list[Prompt]:
        self.drawn += n
        return [prompt(i) for i in range(self.drawn - n, self.drawn)]


def prompt(i: int) -> Prompt:
    return Prompt(i, (7, i % 3), str(i), "numbers")


def response(length: int, finished: bool = True, **more: Any) -> Response:
    return Response(tuple(range(length)), finished, tuple(-0.5 for _ in range(length)), **more)


def rollouts(kept: list[int], lengths: list[int], left: list[Group] | None = None) -> Rollouts:
    rows = [prompt(i) for i in kept for _ in range(2)]
    return Rollouts(tuple(rows), tuple(map(response, lengths)), tuple(left or ()))


# ---------------------------------------------------------------------------------------------------- order


def test_the_longest_start_first_and_the_engines_share_them_by_length() -> None:
    assert deal_to_engines([3.0, 9.0, 5.0, 1.0, 4.0], 1) == [[1, 2, 4, 0, 3]]
    assert deal_to_engines([3.0, 9.0, 5.0, 1.0, 4.0], 2) == [[1, 0], [2, 4, 3]]  # 12 and 10


def test_without_a_difference_the_rows_go_round() -> None:
    assert deal_to_engines([5.0] * 7, 3) == [[0, 3, 6], [1, 4], [2, 5]]
    assert deal_to_engines([], 2) == [[], []]


@given(st.lists(st.floats(0, 1e4), max_size=40), st.integers(1, 5))
def test_every_row_is_on_one_engine_and_no_load_is_worse_than_the_known_bound(
    expected: list[float], engines: int
) -> None:
    parts = deal_to_engines(expected, engines)
    assert sorted(row for part in parts for row in part) == list(range(len(expected)))
    loads = [sum(expected[row] for row in part) for part in parts]
    best = max([sum(expected) / engines, *expected])
    assert max(loads) <= (4 / 3) * best + max(expected, default=0) / 3 + 1e-6
    assert all(
        [expected[row] for row in part] == sorted((expected[row] for row in part), reverse=True) for part in parts
    )


def test_expectations_come_from_the_prompts_last_lengths_then_from_the_mean() -> None:
    tail = LongTail(SETTINGS)
    groups = [Group(prompt(i)) for i in range(3)]
    assert tail.expected(groups, [50] * 6) == [50.0] * 6  # nothing is known: up to the limit
    tail.take(rollouts([0, 1], [10, 20, 40, 60]))
    assert tail.expected(groups, [50] * 6) == [15.0, 15.0, 50.0, 50.0, 32.5, 32.5]
    tail.take(rollouts([3], [30, 30]))  # the same text as prompt 0: the last time counts
    assert tail.expected(groups[:1], [50, 20]) == [30.0, 20.0]
    for lengths in ((44, 48), (4, 8)):  # left at 46 on average, then at 6: at least so long
        tail.take(rollouts([1], [30, 30], [Group(prompt(0), tuple(map(response, lengths)))]))
        assert tail.expected(groups[:1], [50, 20]) == [46.0, 20.0]


def test_what_is_expected_of_a_begun_response_is_the_rest() -> None:
    tail = LongTail(SETTINGS)
    tail.take(rollouts([0], [20, 20]))
    begun = Group(prompt(0), (response(12, finished=False), response(5)))
    late = Group(prompt(0), (response(40, finished=False), response(30, finished=False, stopped=True)))
    assert tail.expected([begun, late], [50] * 4) == [8.0, 0.0, 10.0, 0.0]  # longer than expected: up to the limit
    assert tail.expected([begun], [12, 50]) == [0.0, 0.0]  # it is at the limit


def test_an_endless_source_is_not_remembered_and_no_history_grows_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    tail = LongTail(SETTINGS, endless=True)
    tail.take(rollouts([0], [20, 20]))
    assert tail.history == {}
    monkeypatch.setattr("prune_opd.rollout.long_tail.REMEMBERED", 2)
    tail = LongTail(SETTINGS)
    for i in (0, 1, 0, 2):
        tail.take(rollouts([i], [i + 1, i + 1]))
    assert list(tail.history.values()) == [1.0, 3.0]  # prompt 1 was the oldest


# ---------------------------------------------------------------------------------------------------- the race


def test_the_first_complete_groups_win_by_step_and_then_by_place() -> None:
    race = Race(groups=4, responses=2, keep=2)
    race.arrive({0: 3, 2: 9, 6: 5})
    assert not race.over
    with pytest.raises(ValueError, match="0 groups are complete, 2 are wanted"):
        race.winners()
    race.arrive({0: 3, 1: 8, 3: 9, 7: 8})
    assert race.over and race.winners() == [0, 3]  # at steps 8, 9 and 8
    race.arrive({4: 8, 5: 8})
    assert race.winners() == [0, 2]  # three at step 8: the lower two


@given(st.permutations(list(range(12))), st.integers(1, 6))
def test_any_order_of_arrival_has_the_same_winners(order: list[int], keep: int) -> None:
    steps = [random.Random(row).randint(1, 4) for row in range(12)]
    whole, piecewise = Race(6, 2, keep), Race(6, 2, keep)
    whole.arrive(dict(enumerate(steps)))
    for row in order:
        piecewise.arrive({row: steps[row]})
    assert whole.winners() == piecewise.winners() and len(whole.winners()) == keep


def test_those_that_were_left_before_are_waited_for() -> None:
    race = Race(groups=4, responses=1, keep=2, must=1)
    race.arrive({1: 3, 2: 4, 3: 5})
    assert not race.over
    with pytest.raises(ValueError, match="3 groups are complete, 2 are wanted, the first 1 among them"):
        race.winners()
    race.arrive({0: 90})
    assert race.over and race.winners() == [0, 1]
    assert Race(4, 1, keep=2, must=3).must == 2


def test_more_than_there_are_is_all() -> None:
    race = Race(2, 1, keep=5)
    race.arrive({0: 1, 1: 1})
    assert race.over and race.winners() == [0, 1]


# ---------------------------------------------------------------------------------------------------- from step to step


def test_what_was_left_comes_first_and_no_prompt_is_lost() -> None:
    tail, sampler = LongTail(SETTINGS), Numbers()
    assert started_prompts(SETTINGS) == 6 and [group.prompt.index for group in tail.next(sampler)] == list(range(6))
    left = [Group(prompt(1), (response(7, finished=False, stale=2), response(4))), Group(prompt(4), (response(0),) * 2)]
    batch = rollouts([0, 2, 3, 5], [5] * 8, left)
    tail.take(batch)
    assert tail.record(batch) == {"prompts_left": 2, "tokens_left": 9, "stale_tokens": 0}
    assert (batch.tokens, batch.generated) == (40, 49)
    groups = tail.next(sampler)
    assert [group.prompt.index for group in groups] == [1, 4, 6, 7, 8, 9] and sampler.drawn == 10
    assert [(len(row.ids), row.stale, row.finished) for row in groups[0].begun] == [(7, 7, False), (4, 4, True)]
    assert len(begun_rows(groups, 2)) == 12 and begun_rows(groups, 2)[6].ids == ()
    assert tail.waiting == []


def test_the_engine_is_asked_for_every_row_of_a_group_from_where_it_has_begun() -> None:
    tail = LongTail(SETTINGS)
    groups = [Group(prompt(4), (response(3, finished=False), response(0, finished=False))), Group(prompt(5))]
    rows = tail.rows(groups, [9, 8, 7, 6])
    assert [(row.prompt.index, row.sample, row.limit) for row in rows] == [(4, 0, 9), (4, 1, 8), (5, 0, 7), (5, 1, 6)]
    assert [len(row.begun.ids) for row in rows] == [3, 0, 0, 0]
    assert [row.work for row in rows] == tail.expected(groups, [9, 8, 7, 6]) == [6.0, 8.0, 7.0, 6.0]
    assert [row.work for row in new_rows([prompt(0)], 2, [5, 3])] == [5, 3]  # nothing is known: what they may have


def test_there_is_a_race_only_where_more_is_started_than_kept() -> None:
    tail, new, begun = LongTail(SETTINGS), Group(prompt(1)), Group(prompt(0), (response(1), response(2)))
    assert tail.race([new] * SETTINGS.prompts) is None
    race = tail.race([begun, *[new] * SETTINGS.prompts])
    assert race is not None
    assert (race.keep, race.must, race.responses) == (SETTINGS.prompts, 1, SETTINGS.responses)


def test_without_partial_rollouts_they_are_given_up() -> None:
    tail = LongTail(dataclasses.replace(SETTINGS, partial=False))
    tail.take(rollouts([0], [5, 5], [Group(prompt(1), (response(7), response(4)))]))
    assert tail.waiting == []


def test_a_checkpoint_holds_it_all() -> None:
    tail, again = LongTail(SETTINGS), LongTail(SETTINGS)
    tail.take(rollouts([0], [5, 7], [Group(prompt(1), (response(7, finished=False), response(4)))]))
    again.load_state_dict(json.loads(json.dumps(tail.state_dict())))
    assert (again.waiting, again.history) == (tail.waiting, tail.history)
    hinted = dataclasses.replace(prompt(1), teacher_ids=(4, 5, 6))
    tail.take(rollouts([0], [5, 7], [Group(hinted, (response(7, finished=False), response(4)))]))
    again.load_state_dict(json.loads(json.dumps(tail.state_dict())))
    assert again.waiting[-1].prompt == hinted
    tail.waiting.pop()
    other = LongTail(dataclasses.replace(SETTINGS, responses=3))  # the begun responses do not fit any more
    other.load_state_dict(tail.state_dict())
    assert other.waiting == [Group(prompt(1))]


def test_waiting_prompts_with_other_teachers_or_hints_are_given_up() -> None:
    here = Path(".")
    one, hinted = train_config(here, here), train_config(here, here, data=DataConfig(teacher_prompt="solution"))
    teachers = {name: TeacherConfig("elsewhere", (source,)) for name, source in (("a", "ledger"), ("b", "other"))}
    several = dataclasses.replace(one, teacher="", teachers=teachers)
    for then, now in ((one, several), (several, one), (one, hinted)):
        tail = LongTail(SETTINGS, taught=taught_by(then))
        tail.take(rollouts([0], [5, 7], [Group(prompt(1), (response(7, finished=False), response(4)))]))
        saved = json.loads(json.dumps(tail.state_dict()))
        LongTail(SETTINGS, taught=taught_by(then)).load_state_dict(saved)
        again = LongTail(SETTINGS, taught=taught_by(now))
        with pytest.raises(
            ConfigError, match=r"the checkpoint's 1 waiting prompts had (teachers|data\.teacher_prompt)"
        ):
            again.load_state_dict(saved)
        assert (again.waiting, again.history) == ([], tail.history)
        again.load_state_dict(saved | {"waiting": []})


def test_nothing_is_recorded_where_every_prompt_is_kept() -> None:
    assert LongTail(RolloutConfig(prompts=4)).record(rollouts([0], [5, 7])) == {}


def test_partial_rollouts_need_something_to_be_left_and_a_ratio() -> None:
    here = Path(".")
    train_config(here, here, rollout=RolloutConfig(oversample=1.5, partial=True))
    with pytest.raises(ConfigError, match=r"rollout\.partial = true with rollout\.oversample = 1:"):
        train_config(here, here, rollout=RolloutConfig(partial=True))
    with pytest.raises(ConfigError, match=r"rollout\.partial = true with objective\.temperature = 0\.7"):
        train_config(here, here, rollout=SETTINGS, objective=ObjectiveConfig(temperature=0.7))
    with pytest.raises(ConfigError, match=r"rollout\.partial = true with rollout\.temperature = 0\.7"):
        train_config(here, here, rollout=dataclasses.replace(SETTINGS, temperature=0.7))
    for value in (0.9, 17, float("nan")):
        with pytest.raises(ConfigError, match=r"rollout\.oversample"):
            RolloutConfig(oversample=value)


# ---------------------------------------------------------------------------------------------------- real engines

WORKER = Path(__file__).with_name("worker_long_tail.py")
LAUNCHES = {"two engines": 1, "one engine of two ranks": 2}  # tensor parallelism of an engine

Results = list[dict[str, Any]]  # of every rank


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    models = tmp_path_factory.mktemp("models")
    write_pair(models)
    results: dict[str, Results] = {}
    for name, tensor_parallel in LAUNCHES.items():
        out = tmp_path_factory.mktemp(name.replace(" ", "_"))
        run_ranks(WORKER, 2, [models, out, str(tensor_parallel)], timeout=180)
        results[name] = read_ranks(out, 2)
    return results


@pytest.fixture(params=LAUNCHES)
def results(request: pytest.FixtureRequest, launches: dict[str, Results]) -> Results:
    return launches[request.param]


def test_every_rank_has_the_same_batch_winners_and_rest(results: Results) -> None:
    assert results[0] == results[1]


def test_the_order_of_the_start_changes_no_token(results: Results) -> None:
    assert results[0]["other order"] == results[0]["plain"]


@pytest.mark.parametrize("name", ("race", "race with a watch"))
def test_the_first_complete_groups_are_kept_whole_and_the_others_are_prefixes(results: Results, name: str) -> None:
    plain, race = results[0]["plain"], results[0][name]
    shortest = sorted(sorted(range(len(LIMITS)), key=lambda group: LIMITS[group])[:KEEP])
    assert [index // 7 for index in race["prompts"][::RESPONSES]] == shortest
    for place, group in enumerate(shortest):
        for sample in range(RESPONSES):
            assert race["kept"][place * RESPONSES + sample] == plain[group * RESPONSES + sample]
    others = [group for group in range(len(LIMITS)) if group not in shortest]
    assert [group for group, _ in race["left"]] == others
    slowest = max(LIMITS[group] for group in shortest)
    for group, rows in race["left"]:
        for sample, ids in enumerate(rows):
            whole = plain[group * RESPONSES + sample]["ids"]
            assert ids == whole[: len(ids)]
            assert slowest <= len(ids) <= slowest + RACE_GAP + 1  # an engine may be one prefill ahead
    assert race["generated"] == sum(len(row["ids"]) for row in race["kept"]) + sum(
        len(ids) for _, rows in race["left"] for ids in rows
    )


def test_engines_are_free_for_the_next_batch_after_a_race(results: Results) -> None:
    assert results[0]["plain after the races"] == results[0]["plain"] and not results[0]["unfinished"]


def test_a_begun_response_goes_on_after_its_tokens_and_keeps_their_probabilities(results: Results) -> None:
    """Greedy sampling from the same weights gives the same tokens, interrupted or not."""
    whole, resumed = results[0]["greedy"], results[0]["greedy, begun"]
    for row, (expected, got) in enumerate(zip(whole, resumed, strict=True)):
        stale = min(STALE[row], len(expected["ids"]))
        assert got["ids"] == expected["ids"] and got["finished"] == expected["finished"]
        assert got["stale"] == stale
        assert got["logprobs"][:stale] == expected["logprobs"][:stale]
        assert got["logprobs"] == pytest.approx(expected["logprobs"], abs=2e-4)
        assert len(got["logprobs"]) == len(got["ids"])


def test_a_begun_response_that_has_ended_or_is_beyond_its_limit_is_not_generated(results: Results) -> None:
    finished, stopped, beyond, new = results[0]["ended"]
    assert (finished["ids"], finished["finished"], finished["stale"]) == ([3, 4, 5], True, 3)
    assert (stopped["ids"], stopped["finished"], stopped["stopped"]) == ([3, 4, 5, 6], False, True)
    assert (beyond["ids"], beyond["finished"], beyond["stale"]) == ([3, 4, 5, 6, 7], False, 5)
    assert beyond["logprobs"] == [-1.0] * 5 and len(new["ids"]) == 5 and new["stale"] == 0


def test_a_prompt_that_was_left_before_is_waited_for(results: Results) -> None:
    """The first is not among the three shortest, which are 1, 5 and 3."""
    assert results[0]["waited for"] == [0, 1, 5]


def test_stale_tokens_are_no_events_in_flight(results: Results) -> None:
    """A row with all its scripted drift in stale tokens goes on; a row with enough drift after them is cut."""
    assert results[0]["scripted, begun"] == {"stopped": [[1, 16]], "too early": 0}
