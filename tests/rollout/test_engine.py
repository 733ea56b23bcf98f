"""The vLLM engine inside the ranks: samples depend on seeds and weights alone, and the process stays as it was."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from prune_opd.check.machine import compiler_problems
from prune_opd.config import RolloutConfig
from prune_opd.rollout.cpu_norm import PROVIDER
from tests.distributed.ranks import read_ranks, run_ranks
from tests.distributed.tiny_run import write_pair
from tests.rollout.worker_engine import EOS, LENGTHS, MANY, MAX_TOKENS, RESPONSES

WORKER = Path(__file__).with_name("worker_engine.py")
# Ranks, pipeline stages of the trainer, tensor parallelism of an engine, sequences that run at once, GB of cache, and
# whether vLLM compiles the model: its tokens are the same, and what it has compiled must see weights loaded later. With
# three sequences the others wait; 1 MB is 2000 tokens, too few for the long prompts: sequences are put out and started
# again.
LAUNCHES = {
    "one engine": (1, 1, 1, 64, 0.25, "eager"),
    "two engines": (2, 2, 1, 3, 0.25, "eager"),
    "one engine of two ranks": (2, 1, 2, 64, 0.001, "eager"),
    "two compiled engines": (2, 2, 1, 3, 0.25, "compiled"),
    "a compiled engine of two ranks": (2, 1, 2, 64, 0.001, "compiled"),
}
NO_COMPILER = compiler_problems(RolloutConfig(enforce_eager=False), gpu=False)
SPREAD = 2e-4  # nats between engine and trainer; the first sync allows 1e-3

Results = list[dict[str, Any]]  # of every rank


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    models = tmp_path_factory.mktemp("models")
    write_pair(models)
    results: dict[str, Results] = {}
    for name, (ranks, *settings) in LAUNCHES.items():
        if NO_COMPILER and settings[-1] == "compiled":
            continue
        out = tmp_path_factory.mktemp(name.replace(" ", "_"))
        cache = {"VLLM_CACHE_ROOT": str(tmp_path_factory.getbasetemp() / "vllm")}
        kind = str(settings[-1])
        run_ranks(WORKER, ranks, [models, out, *map(str, settings)], timeout=180, env=cache, kind=kind)
        results[name] = read_ranks(out, ranks)
    return results


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.skipif(bool(NO_COMPILER) and mode == "compiled", reason=str(NO_COMPILER)))
        for name, (*_, mode) in LAUNCHES.items()
    ]
)
def results(request: pytest.FixtureRequest, launches: dict[str, Results]) -> Results:
    return launches[request.param]


# ---------------------------------------------------------------------------------------------------- sampling


def test_the_number_and_the_layout_of_the_engines_do_not_change_the_tokens(launches: dict[str, Results]) -> None:
    (expected,) = launches["one engine"]
    assert len(expected["tokens"]) == len(LENGTHS) * RESPONSES
    for name, ranks in launches.items():
        for rank in ranks:
            assert rank["tokens"] == expected["tokens"], name
            assert rank["many"] == expected["many"], name


def test_every_rank_has_the_whole_batch(launches: dict[str, Results]) -> None:
    for ranks in launches.values():
        assert all(rank == ranks[0] for rank in ranks)


def test_the_order_of_the_prompts_does_not_change_the_tokens(results: Results) -> None:
    assert results[0]["reversed"] == results[0]["tokens"]


def test_the_size_of_the_batch_does_not_change_the_tokens(results: Results) -> None:
    alone = results[0]["one by one"]
    assert len(alone) == len(LENGTHS)
    assert alone == {name: ids for name, ids in results[0]["tokens"].items() if name in alone}


def test_prompts_that_do_not_fit_into_one_prefill_change_nothing(results: Results) -> None:
    """A prompt that is cut in the middle would draw a random number twice: a CPU generator cannot be rewound."""
    assert len(results[0]["many"]) == len(MANY) and sum(MANY) > 8192
    assert results[0]["many"] == results[0]["many, by ten"]


def test_samples_seeds_and_steps_all_give_other_tokens(results: Results) -> None:
    tokens = results[0]["tokens"]
    prompts = {name.split("/")[0] for name in tokens}
    assert all(tokens[f"{prompt}/0"] != tokens[f"{prompt}/1"] for prompt in prompts)
    for other in ("another seed", "another step"):
        assert all(results[0][other][name] != ids for name, ids in tokens.items())


def test_a_prompt_that_is_twice_in_a_batch_has_other_responses_the_second_time(results: Results) -> None:
    rows, tokens = results[0]["twice in a batch"], list(results[0]["tokens"].values())[RESPONSES:]
    assert rows[: len(tokens)] == tokens and len(rows) == 2 * len(tokens)
    assert len(set(map(tuple, rows))) == len(rows)


def test_greedy_sampling_does_not_look_at_the_seed(results: Results) -> None:
    first, second = results[0]["greedy"]
    assert first == second
    assert all(first[name] == first[name.split("/")[0] + "/0"] for name in first)


def test_a_response_ends_at_the_horizon_or_with_the_end_of_sequence(results: Results) -> None:
    longer = results[0]["longer"]
    assert {finished for _, finished in longer} == {True, False}
    for ids, finished in longer:
        assert finished == (ids[-1] == EOS)
        assert len(ids) == MAX_TOKENS + 8 or finished
        assert EOS not in ids[:-1]


def test_a_stop_on_another_id_is_an_end_like_the_models_own_and_changes_no_token_before(results: Results) -> None:
    (stop,), longer, stopped = (results[0][name] for name in ("stop ids", "longer", "stopped"))
    assert len(longer) == len(stopped) and stop != EOS
    assert sum(ids[-1] == stop for ids, _ in stopped) > sum(ids[-1] == stop for ids, _ in longer)
    for (ids, finished), (whole, ended) in zip(stopped, longer, strict=True):
        here = whole.index(stop) + 1 if stop in whole else len(whole)
        assert ids == whole[:here] and finished == (stop in whole or ended)


def test_a_limit_of_its_own_cuts_each_response_and_changes_no_token(results: Results) -> None:
    limits, limited = results[0]["limited"]
    whole = list(results[0]["tokens"].values())
    assert len(set(limits)) > 3
    assert limited == [ids[:limit] for ids, limit in zip(whole, limits, strict=True)]


def test_a_longer_horizon_and_more_samples_continue_the_same_responses(results: Results) -> None:
    longer = [ids for ids, _ in results[0]["longer"]]
    samples = len(longer) // len(LENGTHS)
    same = [longer[row + sample] for row in range(0, len(longer), samples) for sample in range(RESPONSES)]
    assert [ids[:MAX_TOKENS] for ids in same] == list(results[0]["tokens"].values())


# ---------------------------------------------------------------------------------------------------- weights


def test_logprobs_of_the_engine_equal_those_of_the_trainer(results: Results) -> None:
    assert results[0]["parity from disk"] <= SPREAD


def test_logprobs_are_those_of_the_model_not_of_the_sampling_temperature(results: Results) -> None:
    assert results[0]["parity at temperature 0.6"] <= SPREAD


def test_loaded_weights_replace_the_old_ones_everywhere(results: Results) -> None:
    """The tied head and cached prefixes included."""
    assert results[0]["parity of other weights"] <= SPREAD
    assert results[0]["other weights"] != results[0]["tokens"]


def test_a_reload_there_and_back_gives_identical_tokens(results: Results) -> None:
    assert results[0]["reloaded"] == results[0]["tokens"]
    assert results[0]["parity after reload"] <= SPREAD


def test_the_first_sync_brings_the_students_weights_and_passes_its_own_check(results: Results) -> None:
    assert results[0]["synced"] == results[0]["tokens"]


def test_weights_that_are_not_the_students_are_refused_with_the_difference(results: Results) -> None:
    error = results[0]["error of other weights"]
    assert re.search(r"rollout engine and the trainer differ by \d\.\d\de\+00 nats .*0\.001", error), error
    assert "the weights in the engine are not the student's" in error


def test_a_stream_that_swaps_two_layers_is_stopped_by_the_first_sync(results: Results) -> None:
    error = results[0]["error of swapped layers"]
    assert re.search(r"after a weight sync .* differ by \d\.\d\de[+-]\d\d nats", error), error
    assert "the weights in the engine are not the student's" in error


def test_the_second_sync_notices_weights_that_did_not_arrive(results: Results) -> None:
    assert "the weights in the engine are not the student's" in results[0]["error of a second load that does nothing"]


def test_later_syncs_are_compared_as_often_as_parity_every_says(results: Results) -> None:
    """Steps 0 and 1 are the first two loads; of the loads at 2, 3, 4, 5 and 7, two steps apart at the least."""
    assert results[0]["compared"] == {"0": [0, 1], "2": [0, 1, 3, 5, 7], "1": [0, 1, 2, 3, 4, 5, 7]}


def test_prefixes_cached_under_other_weights_would_be_wrong_and_are_dropped(results: Results) -> None:
    stale, fresh = results[0]["stale prefixes"]
    assert fresh <= SPREAD < 1e-3 < stale


# ---------------------------------------------------------------------------------------------------- the process


def test_vllm_compiles_the_model_when_it_is_asked_to_and_nothing_later(launches: dict[str, Results]) -> None:
    for name, ranks in launches.items():
        graphs = 1 if LAUNCHES[name][-1] == "compiled" else 0
        assert all(rank["compiled graphs"] == {"at first": graphs, "in the end": graphs} for rank in ranks), name


def test_an_eager_engine_has_the_kernel_of_rmsnorm_and_a_compiled_one_torch(launches: dict[str, Results]) -> None:
    for name, ranks in launches.items():
        compiled = LAUNCHES[name][-1] == "compiled"
        assert all(rank["norms"]["first"] == ("native" if compiled else PROVIDER) for rank in ranks), name


def test_the_kernel_of_rmsnorm_is_torchs_up_to_rounding(launches: dict[str, Results]) -> None:
    """fp32: a few roundings in another order. bf16: torch rounds once more, before the weight."""
    for name, ranks in launches.items():
        for rank in ranks if LAUNCHES[name][-1] != "compiled" else []:
            assert max(rank["norms"]["torch.float32"]) <= 4 and max(rank["norms"]["torch.bfloat16"]) <= 1
            assert all(rank["norms"]["left to torch"])


def test_construction_load_and_generate_leave_the_global_generators_alone(results: Results) -> None:
    for rank in results:
        assert rank["rng changed"] == []


def test_the_number_of_threads_stays_and_can_be_set(results: Results) -> None:
    for rank in results:
        before, after, set_to_two = rank["threads"]
        assert before == after
        assert set_to_two == 2


def test_shared_memory_that_a_killed_run_left_is_replaced_and_no_other_runs(launches: dict[str, Results]) -> None:
    """A left-over segment with this run's name would end the run; a segment of another run is not ours to remove."""
    segments = launches["one engine of two ranks"][0]["shared memory"]
    assert len({segment["path"] for segment in segments}) == 2
    if not segments[0]["shared"]:
        pytest.skip("this processor has no AVX-512, and vLLM's kernels for it no shared memory")
    for segment in segments:
        assert segment["in use"] > len("left behind") == segment["others"]
        assert not Path(segment["path"]).exists(), "the engine takes it away when it ends"
