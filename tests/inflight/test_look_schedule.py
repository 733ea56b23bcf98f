"""Which of the in-flight gate's looks pay, from the batches before."""

from __future__ import annotations

import json
import math
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd.config import InflightConfig
from prune_opd.data.prompt import Prompt
from prune_opd.errors import ConfigError
from prune_opd.inflight.gate import courses
from prune_opd.inflight.look_schedule import BATCHES, Course, LookSchedule
from prune_opd.rollout.batch import Response, Rollouts

LOOKS = (10, 20, 40, 80)


def value(schedule: LookSchedule, batch: list[Course], chosen: tuple[int, ...]) -> float:
    """V(C) from the definition."""
    total = 0.0
    for course in batch:
        running = True
        for look in chosen:
            if running and course.length > look:
                if course.spent is not None and course.spent <= look:
                    total += (1 + schedule.price) * (course.length - look)
                    running = False
                else:
                    total -= schedule.price * (course.prompt + look)
    return total


def schedule_of(batch: list[Course], price: float = 0.25) -> LookSchedule:
    schedule = LookSchedule(price)
    schedule.learn(batch)
    return schedule


def test_every_look_takes_place_while_nothing_is_known_or_charged() -> None:
    assert LookSchedule(0.25).choose(LOOKS) == LOOKS
    assert schedule_of([Course(5, 50, None)] * 8, price=0).choose(LOOKS) == LOOKS


def test_nobody_looks_where_nothing_drifts() -> None:
    assert schedule_of([Course(5, 100, None)] * 8).choose(LOOKS) == ()
    assert schedule_of([]).choose(LOOKS) == ()


def test_the_first_look_after_the_drift_is_enough() -> None:
    """All of them are spent at 15: a look at 20 avoids 80 tokens of each; one at 10 would find nothing."""
    assert schedule_of([Course(5, 100, 15)] * 8).choose(LOOKS) == (20,)


def test_two_kinds_of_drift_need_two_looks() -> None:
    assert schedule_of([Course(5, 400, 8)] * 4 + [Course(5, 400, 70)] * 4).choose(LOOKS) == (10, 80)


def test_a_look_that_costs_more_than_it_avoids_is_left_out() -> None:
    """One of twenty is spent: 90 tokens are avoided at 10, the teacher reads 19 · (90 + 10) in vain."""
    batch = [Course(90, 100, 8)] + [Course(90, 100, None)] * 19
    assert schedule_of(batch, price=0.25).choose(LOOKS) == ()
    assert schedule_of(batch, price=0.01).choose(LOOKS) == (10,)


COURSES = st.lists(
    st.builds(Course, st.integers(1, 40), st.integers(1, 150).map(float), st.none() | st.integers(1, 120)), max_size=12
)


@settings(max_examples=200, deadline=None)
@given(COURSES, st.floats(0.01, 2))
def test_no_other_choice_is_worth_more(batch: list[Course], price: float) -> None:
    schedule = schedule_of(batch, price)
    subsets = [chosen for size in range(len(LOOKS) + 1) for chosen in combinations(LOOKS, size)]
    best = max(value(schedule, batch, chosen) for chosen in subsets)
    assert value(schedule, batch, schedule.choose(LOOKS)) == pytest.approx(best, abs=1e-6)


def test_old_batches_are_forgotten_and_a_checkpoint_holds_the_others() -> None:
    schedule = schedule_of([Course(5, 100, 15)] * 8)
    for _ in range(BATCHES):
        schedule.learn([Course(5, 100, None)])
    assert schedule.choose(LOOKS) == ()
    schedule.learn([Course(5, 100, 15)] * 8)
    again = LookSchedule(0.25)
    again.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert again.batches == schedule.batches and again.choose(LOOKS) == schedule.choose(LOOKS) == (20,)


def test_a_batch_teaches_where_responses_were_spent_and_where_the_gate_in_flight_sees_it() -> None:
    def response(length: int, stopped: bool = False) -> Response:
        return Response(tuple(range(length)), finished=not stopped, stopped=stopped)

    stopped = (response(20, stopped=True), response(40, stopped=True))
    responses = (response(50), response(30), stopped[0], response(40), response(15), stopped[1])
    batch = Rollouts(tuple(Prompt(i, (1, 2, 3), None, "test") for i in range(6)), responses)
    found = courses(batch, [50, 12, 11, math.nan, 4, 22], [60] * 6, looks=(20, 40))
    assert found == [
        Course(3, 50, None),  # reliable to its end
        Course(3, 30, 21),  # R = 0 with token 13, but it was let through at 20
        Course(3, 40, 12),  # stopped at 20; those that went on have 50, 30 and 40 tokens
        Course(3, 15, 5),  # nobody looked before its end
        Course(3, 50, 23),
    ]


def test_a_negative_price_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.inflight\.price = -1"):
        InflightConfig(price=-1)
