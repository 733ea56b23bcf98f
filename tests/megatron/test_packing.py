"""Packed rows are the padded rows without the padding: the same hidden states, loss, gate and gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_opd.megatron.packing import zigzag
from tests.distributed.ranks import run_ranks
from tests.distributed.tiny_run import made_up_rollouts, write_pair
from tests.megatron.worker_packing import LENGTHS, MULTIPLES, SCALES

WORKER = Path(__file__).with_name("worker_packing.py")
RESPONSE_TOKENS = sum(response for _, response in LENGTHS)
EXACT = 1e-5
ROLLOUTS = made_up_rollouts()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("packing")
    write_pair(folder)  # grouped heads: 4 of queries, 2 of keys and values
    run_ranks(WORKER, 1, [folder, folder])
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(params=[(scale, multiple) for scale in SCALES for multiple in MULTIPLES], ids=str)
def case(results: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    return results["{} {}".format(*request.param)]


def test_packed_hidden_states_are_those_of_padded_rows_through_megatrons_own_attention(case: dict[str, Any]) -> None:
    assert case["hidden"] <= EXACT


def test_every_parameters_gradient_is_the_same(case: dict[str, Any]) -> None:
    """Of the distillation loss, and of a function of all hidden states, the prompts' included."""
    assert case["all_gradients"].keys() == case["step_gradients"].keys() and len(case["all_gradients"]) > 10
    for kind in ("all_gradients", "step_gradients"):
        for name, difference in case[kind].items():
            assert difference <= EXACT, f"{kind} {name}"


def test_loss_and_gate_of_the_distillation_step_are_the_same(case: dict[str, Any]) -> None:
    assert case["tokens"] == [RESPONSE_TOKENS, RESPONSE_TOKENS]
    assert case["loss"] <= EXACT and case["weight"] <= EXACT
    assert case["same_gate"] and 0.1 < case["event_rate"] < 0.9


def test_the_softmax_scale_is_not_ignored(results: dict[str, Any]) -> None:
    assert results["None 1"]["event_rate"] != results["0.4 1"]["event_rate"]


# ---------------------------------------------------------------------------------------------------- what is packed


def micro_batches(results: dict[str, Any], multiple: int) -> list[dict[str, Any]]:
    return results["batches"][str(multiple)]


def test_rows_are_packed_in_order_up_to_the_budget(results: dict[str, Any]) -> None:
    """32 tokens: rows of 4, 13 and 2; one of 42, longer than the budget, alone; one of 17."""
    assert [batch["rows"] for batch in micro_batches(results, 1)] == [[4, 0, 1], [2], [3]]
    assert [batch["cu_seqlens"] for batch in micro_batches(results, 1)] == [[0, 4, 17, 19], [0, 42], [0, 17]]


@pytest.mark.parametrize("multiple", MULTIPLES)
def test_a_segment_is_a_row_without_its_last_token_and_each_of_its_response_tokens_is_predicted(
    results: dict[str, Any], multiple: int
) -> None:
    for batch in micro_batches(results, multiple):
        for i, row in enumerate(batch["rows"]):
            prompt, response = results["prompts"][row], results["responses"][row]
            first, last = batch["cu_seqlens"][i : i + 2]
            assert batch["ids_N"][first:last] == (prompt + response)[:-1]
            assert batch["position_N"][first:last] == list(range(last - first))
            own = slice(*batch["cu_responses"][i : i + 2])
            assert batch["sampled_ids_M"][own] == response
            assert batch["predicting_M"][own] == list(range(first + len(prompt) - 1, last))


def test_dummies_fill_up_to_the_multiple_as_a_segment_that_predicts_nothing(results: dict[str, Any]) -> None:
    for bare, filled in zip(micro_batches(results, 1), micro_batches(results, 16), strict=True):
        real, size = len(bare["ids_N"]), len(filled["ids_N"])
        assert size % 16 == 0 and 0 < size - real < 16
        assert filled["cu_seqlens"] == [*bare["cu_seqlens"], size]
        assert filled["position_N"][real:] == list(range(size - real))
        assert filled["longest"] == max(bare["longest"], size - real)
        for name in ("rows", "predicting_M", "sampled_ids_M", "cu_responses"):
            assert filled[name] == bare[name]


def test_no_rows_are_a_micro_batch_of_dummies(results: dict[str, Any]) -> None:
    empty = results["empty"]
    assert len(empty["ids_N"]) == 4 and empty["cu_seqlens"] == [0, 4] and empty["longest"] == 4
    assert empty["predicting_M"] == empty["sampled_ids_M"] == [] and empty["cu_responses"] == [0]


def test_a_run_fills_its_micro_batches_up_to_what_fp8_wants_and_counts_it_as_padding(results: dict[str, Any]) -> None:
    tokens, waste = results["fp8"]["tokens"], results["fp8"]["waste"]
    assert len(tokens) > 1 and all(count % 16 == 0 and count <= 64 for count in tokens)
    real = sum(len(p.ids) + len(r.ids) - 1 for p, r in zip(ROLLOUTS.prompts, ROLLOUTS.responses, strict=True))
    assert waste == pytest.approx(1 - real / sum(tokens)) and waste > 0


# ---------------------------------------------------------------------------------------------------- attention


def test_without_transformer_engine_the_core_attention_is_ours(results: dict[str, Any]) -> None:
    assert set(results["core_attention"]) == {"PackedSdpaAttention"}


def test_segments_are_given_as_transformer_engine_takes_them(results: dict[str, Any]) -> None:
    segments = results["segments"]
    assert segments["qkv_format"] == "thd" and segments["dtype"] == "torch.int32"
    assert segments["cu_seqlens_q"] == segments["cu_seqlens_kv"] == [0, 13, 15, 16]
    assert segments["max_seqlen_q"] == segments["max_seqlen_kv"] == 13
    assert segments["cu_seqlens_q_padded"] is None and segments["cu_seqlens_kv_padded"] is None


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 4))
def test_context_parallel_ranks_share_every_segment_out_evenly(pieces: list[int], ranks: int) -> None:
    segments = [2 * ranks * size for size in pieces]
    shares = [zigzag(segments, rank, ranks) for rank in range(ranks)]
    assert sorted(token for share in shares for token in share) == list(range(sum(segments)))
    assert {len(share) for share in shares} == {sum(segments) // ranks}
    assert all(share == sorted(share) for share in shares)
    # One piece from the front and one from the back: causal attention costs every rank the same.
    assert len({sum(share) for share in shares}) == 1
