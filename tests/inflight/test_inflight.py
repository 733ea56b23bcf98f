"""The in-flight gate: what is stopped where, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import read_ranks, run_ranks
from tests.distributed.tiny_run import write_pair
from tests.inflight.worker_inflight import MAX_TOKENS, ROWS, SCRIPT, SPENT

WORKER = Path(__file__).with_name("worker_inflight.py")
# Tensor parallelism of an engine (and of the trainer), sequences that run at once. With three the others wait, and so
# reach a look at other steps. The second one schedules asynchronously, as every engine does on a GPU.
LAUNCHES = {"two engines": (1, 3), "one engine of two ranks": (2, 64)}
# What the script costs, by hand: the look at which each row is cut, and the reliable length of each row.
GEOMETRIC = {0: 4, 1: 8, 3: 16, 4: 32, 7: 8}
FIXED = {0: 11, 1: 11, 3: 16, 4: 21, 7: 11}
TWO_EVENTS = {0: 4, 1: 4, 3: 4, 4: 4, 6: 8, 7: 8}
RELIABLE = {0: 3, 1: 4, 3: 15, 4: 16, 7: 7, 10: 36}

Results = list[dict[str, Any]]  # of every rank


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    models = tmp_path_factory.mktemp("models")
    write_pair(models)
    results: dict[str, Results] = {}
    for name, settings in LAUNCHES.items():
        out = tmp_path_factory.mktemp(name.replace(" ", "_"))
        if settings[0] == 1:
            run_ranks(WORKER, 2, [models, out, *map(str, settings)], timeout=180)
        else:  # it ends with a rank that fails in the middle of the engine's step, where the other one waits for it
            with pytest.raises(AssertionError, match="rank 1: RuntimeError: the device fell off") as failure:
                run_ranks(WORKER, 2, [models, out, *map(str, settings)], timeout=180)
            assert "exit code 1\n" in str(failure.value), "the launcher ends the job by itself"
        results[name] = read_ranks(out, 2)
    return results


@pytest.fixture(params=LAUNCHES)
def results(request: pytest.FixtureRequest, launches: dict[str, Results]) -> Results:
    return launches[request.param]


WATCHED = (
    "scripted, geometric",
    "scripted, fixed",
    "scripted, two events",
    "real, overlap",
    "real, top-p",
    "real, change point",
    "real, KL agreement",
)


# ---------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("name", WATCHED)
def test_stopped_responses_are_exact_prefixes_and_the_others_are_as_without_the_gate(
    results: Results, name: str
) -> None:
    plain, watched = results[0]["plain"], results[0][name]["responses"]
    stopped = [stopped for _, _, stopped in watched]
    assert any(stopped) and len(watched) == ROWS
    for (ids, finished, _), (kept, ended, was_stopped) in zip(plain, watched, strict=True):
        if was_stopped:
            assert kept == ids[: len(kept)] and len(kept) < len(ids) and not ended
        else:
            assert (kept, ended) == (ids, finished)


def test_engines_that_share_a_batch_otherwise_stop_the_same_at_the_same_tokens(launches: dict[str, Results]) -> None:
    two, one = (ranks[0] for ranks in launches.values())
    for name in ("plain", "late abort", *(f"{name}" for name in WATCHED)):
        ours, theirs = (_tokens(result[name]) for result in (two, one))
        assert ours == theirs, name


def test_every_rank_has_the_same_verdicts(results: Results) -> None:
    first, second = results
    for name in WATCHED:
        assert first[name]["responses"] == second[name]["responses"]


# ---------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("name", "cuts"),
    [("scripted, geometric", GEOMETRIC), ("scripted, fixed", FIXED), ("scripted, two events", TWO_EVENTS)],
)
def test_a_response_stops_at_the_first_look_after_its_events_are_spent(
    results: Results, name: str, cuts: dict[int, int]
) -> None:
    result = results[0][name]
    lengths = {row: len(ids) for row, (ids, _, stopped) in enumerate(result["responses"]) if stopped}
    assert lengths == cuts
    saved = sum(MAX_TOKENS - length for length in cuts.values())
    assert sum(MAX_TOKENS - len(ids) for ids, _, _ in result["responses"]) == saved
    assert result["record"]["pruned_inflight"] == len(cuts)
    assert result["record"]["tokens_avoided"] == saved  # every other response has MAX_TOKENS, so the estimate is exact


def test_the_losss_gate_agrees_with_the_gate_in_flight(results: Results) -> None:
    """E_i is the same whether the response was cut or not: no cut took a reliable token away."""
    for name in ("scripted, geometric", "scripted, fixed"):
        result = results[0][name]
        reliable = result["loss"]["reliable_length_B"]
        assert reliable == result["loss of all"]["reliable_length_B"]
        assert reliable == [RELIABLE.get(row, MAX_TOKENS) for row in range(ROWS)]
        assert result["record"]["inflight_too_early"] == 0
    for name in ("real, overlap", "real, top-p", "real, change point", "real, overlap quantile", "real, KL agreement"):
        result = results[0][name]
        assert result["loss"]["reliable_length_B"] == result["loss of all"]["reliable_length_B"]
        assert result["too early"] == 0


def test_the_pairs_own_threshold_does_what_the_same_constant_does(results: Results) -> None:
    assert results[0]["real, overlap quantile"] == results[0]["real, overlap"]


def test_a_budget_of_events_may_cut_reliable_tokens_and_the_record_says_so(results: Results) -> None:
    record = results[0]["scripted, two events"]["record"]
    early = [row for row, cut in TWO_EVENTS.items() if RELIABLE.get(row, MAX_TOKENS) >= cut]
    assert record["inflight_too_early"] == len(early) > 0


# ---------------------------------------------------------------------------------------------------- the teacher


def test_hidden_states_of_stopped_responses_are_not_computed_again_and_change_nothing(results: Results) -> None:
    for name in ("scripted, geometric", "scripted, fixed", "scripted, two events"):
        result = results[0][name]
        in_flight, afterwards = result["rows computed"]
        assert in_flight > 0 and afterwards == ROWS - result["record"]["pruned_inflight"]
        assert result["loss"]["reliable_length_B"] == result["loss, nothing kept"]["reliable_length_B"]
        assert result["loss"]["weight_mean"] == pytest.approx(result["loss, nothing kept"]["weight_mean"], abs=1e-12)


def test_geometric_looks_cost_the_teacher_at_most_two_passes(results: Results) -> None:
    record = results[0]["scripted, geometric"]["record"]
    response_tokens = sum(min(at, MAX_TOKENS) for at in (4, 8, 16, 32)) * ROWS
    assert record["teacher_tokens_inflight"] <= 2 * MAX_TOKENS * ROWS + 4 * ROWS * 40  # and the prompts at each
    assert response_tokens <= 2 * MAX_TOKENS * ROWS
    assert record["inflight_checks"] >= 4


def test_the_script_has_a_row_for_every_case() -> None:
    assert sum(len(set(places)) >= SPENT for places in SCRIPT.values()) == len(RELIABLE)
    assert any(len(set(places)) < SPENT for places in SCRIPT.values())


# ---------------------------------------------------------------------------------------------------- failures


def test_an_abort_after_the_finish_changes_nothing(results: Results) -> None:
    assert all(rank["late abort"] for rank in results)


def test_an_engine_that_fails_ends_every_rank_with_its_name_and_its_reason(launches: dict[str, Results]) -> None:
    for rank in launches["two engines"]:
        assert "rank 1: RuntimeError: the device fell off" in rank["errors"]["exception"]


def test_a_request_that_never_finishes_ends_every_rank(results: Results) -> None:
    for rank in results:
        assert "responses never finish" in rank["errors"]["never finishes"]


def test_a_rank_that_disagrees_with_its_engine_ends_every_rank(launches: dict[str, Results]) -> None:
    for rank in launches["one engine of two ranks"]:
        assert "the ranks 0, 1 of rollout engine 0 disagree" in rank["errors"]["disagrees"]
    for rank in launches["two engines"]:  # each rank is its own engine: there is nobody to disagree with
        assert rank["errors"]["disagrees"] == ""


def test_the_engine_generates_as_before_after_a_failure(results: Results) -> None:
    assert all(rank["afterwards"] == rank["plain"] for rank in results)


def _tokens(result: Any) -> Any:
    return result["responses"] if isinstance(result, dict) else result
