"""The horizon controllers: hand-worked steps of method.md §3, and what must hold whatever the rollouts do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_opd.config import HorizonConfig
from prune_opd.errors import ConfigError
from prune_opd.method.horizon import HorizonController, PlateauHorizon, make_controller

ALL = ("full", "topd", "popd", "prune", "marginal", "adwin", "fastopd")
quick = settings(max_examples=80, deadline=None)
PAPER = HorizonConfig("prune", init_len=2048)

Batch = tuple[list[int], list[int], list[bool]]


def batch(*rows: tuple[int, int, bool]) -> Batch:
    """Rows of (reliable length, length, ended by itself)."""
    reliable_length_B, length_B, finished_B = zip(*rows, strict=True)
    return list(reliable_length_B), list(length_B), list(finished_B)


def horizons(controller: HorizonController, batches: list[Batch]) -> list[int]:
    seen = []
    for step in batches:
        controller.update(*step)
        seen.append(controller.horizon)
    return seen


HIT, MISS = batch((99999, 99999, False)), batch((0, 99999, False))

batches = st.lists(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400), st.booleans()), min_size=1, max_size=6).map(
        lambda rows: batch(*[(min(reliable, length), length, finished) for reliable, length, finished in rows])
    ),
    max_size=25,
)


@st.composite
def configs(draw: st.DrawFn, strategies: tuple[str, ...] = ALL) -> HorizonConfig:
    max_len = draw(st.integers(1, 400))
    return HorizonConfig(
        strategy=draw(st.sampled_from(strategies)),
        max_len=max_len,
        min_len=draw(st.integers(1, max_len)),
        init_len=draw(st.integers(1, 500)),
        step=draw(st.integers(1, 120)),
        hit_ratio=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        margin=draw(st.integers(0, 60)),
        patience=draw(st.integers(1, 4)),
        rho=draw(st.sampled_from([0.001, 0.1, 0.25, 1.0])),
        increment=draw(st.integers(0, 50)),
        interval=draw(st.integers(1, 5)),
        finished_rows=draw(st.sampled_from(["miss", "hit_if_reliable", "exclude"])),
        price=draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])),
    )


# ---------------------------------------------------------------------------------------------------- full, TOPD, POPD


def test_full_rollouts_always_have_max_len() -> None:
    assert horizons(make_controller(HorizonConfig("full", max_len=500, min_len=1)), [HIT, MISS]) == [500, 500]


@pytest.mark.parametrize(
    ("rho", "max_len", "horizon"), [(0.10, 12288, 1228), (0.25, 15360, 3840), (0.29, 100, 29), (0.001, 50, 1)]
)
def test_topd_keeps_a_fixed_share_and_at_least_one_token(rho: float, max_len: int, horizon: int) -> None:
    controller = make_controller(HorizonConfig("topd", max_len=max_len, min_len=1, rho=rho))
    assert controller.horizon == horizon
    assert horizons(controller, [HIT, MISS]) == [horizon, horizon]


def test_popd_grows_by_its_increment_every_interval_up_to_max_len() -> None:
    config = HorizonConfig("popd", max_len=1000, min_len=1, init_len=600, increment=150, interval=2)
    controller = make_controller(config)
    assert controller.horizon == 600
    assert horizons(controller, [MISS] * 7) == [600, 750, 750, 900, 900, 1000, 1000]


# ---------------------------------------------------------------------------------------------------- Prune-OPD


def test_the_window_starts_inside_its_limits() -> None:
    assert make_controller(PAPER).horizon == 2048
    assert make_controller(dataclasses.replace(PAPER, init_len=10)).horizon == 1024
    assert make_controller(dataclasses.replace(PAPER, init_len=99999)).horizon == 12288


def test_the_window_grows_with_every_hit_and_shrinks_with_every_third_miss_in_a_row() -> None:
    steps = [HIT, MISS, MISS, HIT, MISS, MISS, MISS, MISS, MISS, MISS]
    expected = [2148, 2148, 2148, 2248, 2248, 2248, 2148, 2148, 2148, 2048]
    assert horizons(make_controller(PAPER), steps) == expected


def test_a_hit_is_one_response_in_ten_that_is_reliable_up_to_the_boundary() -> None:
    # M = 2048 and margin = 100: the boundary is at 1948.
    nine_short = [(0, 2048, False)] * 9
    assert horizons(make_controller(PAPER), [batch((1948, 2048, False), *nine_short)]) == [2148]
    assert horizons(make_controller(PAPER), [batch((1948, 2048, False), (0, 2048, False), *nine_short)]) == [2048]
    patient = dataclasses.replace(PAPER, patience=1)
    assert horizons(make_controller(patient), [batch((1947, 2048, False), *nine_short)]) == [1948]


def test_the_boundary_is_never_below_min_len() -> None:
    at_min = dataclasses.replace(PAPER, init_len=1024, patience=1)
    assert horizons(make_controller(at_min), [batch((1023, 1024, False))]) == [1024]
    assert horizons(make_controller(at_min), [batch((1024, 1024, False))]) == [1124]


@pytest.mark.parametrize(
    ("finished_rows", "row", "horizon"),
    [
        # Ended by itself at 300, reliable throughout.
        ("miss", (300, 300, True), 1948),
        ("hit_if_reliable", (300, 300, True), 2148),
        ("exclude", (300, 300, True), 2048),
        # Ended by itself at 300, but drifted at 250.
        ("miss", (250, 300, True), 1948),
        ("hit_if_reliable", (250, 300, True), 1948),
        ("exclude", (250, 300, True), 2048),
        # Stopped in flight at 300: it did not end by itself.
        ("hit_if_reliable", (300, 300, False), 1948),
        ("exclude", (300, 300, False), 1948),
        # Ended by itself beyond the boundary: judged like any other.
        ("exclude", (1948, 1948, True), 2148),
        ("exclude", (1900, 1948, True), 1948),
    ],
)
def test_a_response_that_ended_by_itself_counts_as_configured(
    finished_rows: str, row: tuple[int, int, bool], horizon: int
) -> None:
    config = dataclasses.replace(PAPER, finished_rows=finished_rows, patience=1)
    assert horizons(make_controller(config), [batch(row)]) == [horizon]


def test_excluded_rows_leave_the_mean() -> None:
    # One hit among eleven is below hit_ratio 0.1; among the two that are left it is not.
    rows = [(2048, 2048, False), (0, 2048, False), *[(300, 300, True)] * 9]
    assert horizons(make_controller(dataclasses.replace(PAPER, finished_rows="miss")), [batch(*rows)]) == [2048]
    assert horizons(make_controller(dataclasses.replace(PAPER, finished_rows="exclude")), [batch(*rows)]) == [2148]


def test_a_step_with_nothing_to_judge_is_neither_hit_nor_miss() -> None:
    config = dataclasses.replace(PAPER, finished_rows="exclude", patience=2)
    nothing = batch((300, 300, True))
    assert horizons(make_controller(config), [MISS, nothing, nothing, MISS]) == [2048, 2048, 2048, 1948]
    assert horizons(make_controller(config), [([], [], [])]) == [2048]


def test_tensors_and_lists_are_the_same_to_a_controller() -> None:
    lists, tensors = make_controller(PAPER), make_controller(PAPER)
    rows = batch((2000, 2048, False), (5, 2048, False))
    lists.update(*rows)
    tensors.update(*[torch.tensor(column) for column in rows])
    assert lists.horizon == tensors.horizon == 2148
    assert lists.state_dict() == tensors.state_dict()


@given(configs(("prune", "marginal")), batches)
@quick
def test_the_window_stays_inside_its_limits(config: HorizonConfig, steps: list[Batch]) -> None:
    controller = make_controller(config)
    before = controller.horizon
    assert config.min_len <= before <= config.max_len
    for horizon in horizons(controller, steps):
        assert config.min_len <= horizon <= config.max_len
        assert abs(horizon - before) <= config.step
        before = horizon


@given(configs(), batches)
@quick
def test_every_horizon_is_between_one_and_max_len(config: HorizonConfig, steps: list[Batch]) -> None:
    controller = make_controller(config)
    assert all(1 <= horizon <= config.max_len for horizon in [controller.horizon, *horizons(controller, steps)])


# ---------------------------------------------------------------------------------------------------- marginal (ours)

MARGINAL = HorizonConfig("marginal", max_len=400, min_len=10, init_len=200, step=20, margin=10, price=0.5)


def test_marginal_shrinks_although_the_luckiest_tenth_are_reliable() -> None:
    lucky = batch(*[(200, 200, False)] * 2, *[(100, 200, False)] * 8)
    prune = HorizonConfig("prune", max_len=400, min_len=10, init_len=200, step=20, margin=10)
    assert horizons(make_controller(prune), [lucky]) == [220]
    # Beyond 100 only a fifth of the tokens are reliable, less than the price: back, a step at a time, to 100 + margin.
    assert horizons(make_controller(MARGINAL), [lucky] * 6) == [180, 160, 140, 120, 110, 110]


def test_marginal_grows_while_more_than_its_price_are_reliable_to_the_end_of_the_window() -> None:
    good = batch(*[(200, 200, False)] * 6, *[(100, 200, False)] * 4)
    assert horizons(make_controller(MARGINAL), [good]) == [220]
    assert horizons(make_controller(dataclasses.replace(MARGINAL, price=0.7)), [good]) == [180]


def test_marginal_opens_to_max_len_where_every_response_ends_reliably_by_itself() -> None:
    short = batch(*[(40, 40, True)] * 8)
    assert horizons(make_controller(MARGINAL), [short] * 12)[-1] == 400


def test_marginal_moves_up_to_an_optimum_that_lies_inside_the_window() -> None:
    # Half of the rows drift at 195 of 200: the optimum is 195, its target 205 is nearer than a whole step.
    assert horizons(
        make_controller(dataclasses.replace(MARGINAL, price=0.6)),
        [batch(*[(195, 200, False)] * 5, *[(200, 200, False)] * 5)],
    ) == [205]


@given(configs(("marginal",)), batches)
@quick
def test_marginal_moves_towards_the_window_of_greatest_value(config: HorizonConfig, steps: list[Batch]) -> None:
    controller = make_controller(config)
    for reliable_length_B, length_B, finished_B in steps:
        window = controller.horizon
        value = [
            sum(min(e, w) for e in reliable_length_B) - config.price * sum(min(n, w) for n in length_B)
            for w in range(window + 1)
        ]
        best = max(range(window + 1), key=lambda w: (round(value[w], 6), w))
        controller.update(reliable_length_B, length_B, finished_B)
        if best == window:
            assert controller.horizon == min(window + config.step, config.max_len)
        else:
            goal = min(max(best + config.margin, config.min_len), config.max_len)
            assert abs(controller.horizon - goal) == max(0, abs(window - goal) - config.step)


# ---------------------------------------------------------------------------------------------------- rivals


def test_adwin_probes_at_full_length_and_trains_on_what_a_probe_found_reliable() -> None:
    config = HorizonConfig("adwin", max_len=400, min_len=20, margin=10, price=0.5, probe_every=3)
    controller = make_controller(config)
    lost = batch((60, 400, False), (60, 400, False), (50, 300, True))
    short = batch((70, 70, False), (70, 70, False), (50, 70, False))  # says nothing of what lies behind
    half = batch((200, 400, False), (200, 300, True), (50, 300, True))
    assert controller.horizon == 400  # the first batch is a probe
    assert horizons(controller, [lost, short, short, half, short, short]) == [70, 70, 400, 210, 210, 400]


def plateau(**changes: Any) -> PlateauHorizon:
    settings: dict[str, Any] = {"max_len": 100, "min_len": 10, "init_len": 40, "step": 20, "margin": 8, "patience": 2}
    controller = make_controller(HorizonConfig("fastopd", **(settings | {"hit_ratio": 0.5} | changes)))
    assert isinstance(controller, PlateauHorizon)
    return controller


def feed(controller: PlateauHorizon, overlaps: Sequence[float], length: int | None = None) -> list[int]:
    """Steps of two responses, both of this length (or up to the window); the other signals stand still."""
    windows = []
    for overlap in overlaps:
        windows.append(controller.horizon)
        controller.see({"overlap": overlap, "mass": 0.9, "gap": 0.3, "gap_size": 1.0})
        controller.update([0, 0], [length or controller.horizon] * 2, [False] * 2)
    return windows


def test_fastopd_grows_once_no_signal_has_improved_for_a_while() -> None:
    assert feed(plateau(), [0.5, 0.6, 0.7, 0.71, 0.705, 0.7, 0.7, 0.7]) == [40] * 5 + [60] * 3
    assert feed(plateau(), [0.5 + 0.05 * i for i in range(9)]) == [40] * 9  # it still learns
    assert feed(plateau(max_len=50), [0.5] * 9)[-1] == 50


def test_fastopd_does_not_grow_where_few_responses_reach_the_end_or_no_token_is_there() -> None:
    assert feed(plateau(), [0.5] * 9, length=39) == [40] * 9
    controller = plateau()
    for _ in range(9):
        controller.see(None)
        controller.update([0], [40], [False])
    assert controller.horizon == 40


def test_fastopd_goes_on_after_a_checkpoint_in_the_middle_of_a_plateau() -> None:
    whole, first, second = plateau(), plateau(), plateau()
    seen = [0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]
    feed(first, seen[:3])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert feed(whole, seen)[3:] == feed(second, seen[3:]) == [40, 60, 60, 60]


# ---------------------------------------------------------------------------------------------------- checkpoints


@given(configs(), batches, st.integers(0, 25))
@quick
def test_a_restored_controller_continues_as_if_it_had_never_stopped(
    config: HorizonConfig, steps: list[Batch], stop: int
) -> None:
    whole = make_controller(config)
    expected = horizons(whole, steps)
    first, second = make_controller(config), make_controller(config)
    seen = horizons(first, steps[:stop])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.horizon == first.horizon
    assert seen + horizons(second, steps[stop:]) == expected
    assert second.state_dict() == whole.state_dict()


def test_misses_before_a_checkpoint_still_count_after_it() -> None:
    controller = make_controller(PAPER)
    for step in range(1, 4):
        controller.update(*MISS)
        state = controller.state_dict()
        controller = make_controller(PAPER)
        controller.load_state_dict(state)
        assert controller.horizon == (1948 if step == 3 else 2048)


@pytest.mark.parametrize("own", ALL)
@pytest.mark.parametrize("other", ALL)
def test_the_state_of_another_strategy_is_refused(own: str, other: str) -> None:
    def controller(strategy: str) -> HorizonController:
        return make_controller(HorizonConfig(strategy, init_len=2000, rho=0.5, increment=1, interval=1))

    state = controller(other).state_dict()
    if own == other:
        controller(own).load_state_dict(state)
    else:
        with pytest.raises(ConfigError, match=f"horizon.strategy = '{own}'.*written by '{other}'"):
            controller(own).load_state_dict(state)


def test_a_state_with_a_value_missing_is_refused() -> None:
    with pytest.raises(ConfigError, match="no 'misses'"):
        make_controller(PAPER).load_state_dict({"strategy": "prune", "window": 2000})


def test_a_restored_window_is_brought_inside_tighter_limits() -> None:
    state: dict[str, Any] = {"strategy": "prune", "window": 9000, "misses": 1}
    controller = make_controller(dataclasses.replace(PAPER, max_len=4096))
    controller.load_state_dict(state)
    assert controller.horizon == 4096


def test_columns_of_different_length_are_named() -> None:
    for strategy in ("full", "popd", "prune"):
        controller = make_controller(HorizonConfig(strategy, init_len=2000, rho=0.5, increment=1, interval=1))
        with pytest.raises(ValueError, match="reliable_length has 2, length has 2, finished has 1"):
            controller.update([1, 2], [3, 4], [True])
