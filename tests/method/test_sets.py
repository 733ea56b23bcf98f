"""Sets of ids: the same answers as comparing every pair, in memory that grows with k and not with k²."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prune_opd.config import ObjectiveConfig
from prune_opd.inflight.certain_events import certain_overlap_events
from prune_opd.method import sets
from prune_opd.method.gate import overlap_ratio, top_p_reject
from prune_opd.method.objective import candidates
from prune_opd.method.sets import among
from tests.peak import peak_bytes
from tests.reference import make_case


def pairwise_among(ids_NK: Tensor, others_NC: Tensor) -> Tensor:
    return (ids_NK.unsqueeze(-1) == others_NC.unsqueeze(-2)).any(-1)


def drawn(tokens: int, k: int, vocab: int, seed: int) -> Tensor:
    """k distinct ids of each token, in no order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(vocab, generator=generator)[:k] for _ in range(tokens)])


@given(st.integers(0, 5), st.integers(1, 9), st.integers(1, 9), st.integers(9, 14), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_membership_is_that_of_all_pairs(tokens: int, k: int, others: int, vocab: int, seed: int) -> None:
    ids_NK = drawn(tokens, k, vocab, seed) if tokens else torch.zeros(0, k, dtype=torch.long)
    others_NC = drawn(tokens, others, vocab, seed + 1) if tokens else torch.zeros(0, others, dtype=torch.long)
    assert torch.equal(among(ids_NK, others_NC), pairwise_among(ids_NK, others_NC))
    counted_NC = others_NC % 2 == 0
    expected_NK = ((ids_NK.unsqueeze(-1) == others_NC.unsqueeze(-2)) & counted_NC.unsqueeze(-2)).any(-1)
    assert torch.equal(among(ids_NK, others_NC, counted_NC), expected_NK)


def test_tokens_are_looked_up_a_few_at_a_time_and_dimensions_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "BLOCK", 12)  # two tokens of six ids
    ids, others = drawn(15, 6, 20, 0).view(3, 5, 6), drawn(15, 6, 20, 1).view(3, 5, 6)
    assert torch.equal(among(ids, others), pairwise_among(ids, others))
    assert among(ids[0, 0], others[0, 0]).tolist() == pairwise_among(ids[0, 0], others[0, 0]).tolist()


# ---------------------------------------------------------------------------------------------------- memory

TOKENS, LARGE = 16, 4096
PER_ID = 64  # bytes: ids of both sides, their order, places and answers; all pairs would be LARGE bytes and more


@pytest.mark.parametrize("support", ["union", "intersection"])
def test_supports_of_4096_ids_stay_within_64_bytes_an_id(support: str) -> None:
    objective = ObjectiveConfig(k=LARGE, support=support)  # type: ignore[arg-type]
    sampled_N, student_NK, teacher_NK = torch.zeros(TOKENS), *(drawn(TOKENS, LARGE, 6000, seed) for seed in (0, 1))

    def run() -> None:
        candidates(objective, sampled_N, student_NK, teacher_NK)

    assert peak_bytes(run) < PER_ID * TOKENS * LARGE


def test_the_overlap_of_4096_ids_stays_within_64_bytes_an_id() -> None:
    student_NK, teacher_NK = (drawn(TOKENS, LARGE, 6000, seed) for seed in (0, 1))
    assert peak_bytes(lambda: overlap_ratio(student_NK, teacher_NK)) < PER_ID * TOKENS * LARGE
    assert peak_bytes(lambda: pairwise_among(student_NK, teacher_NK)) > 10 * PER_ID * TOKENS * LARGE


def test_certain_events_of_4096_ids_stay_within_twice_that() -> None:
    ids = [drawn(TOKENS, LARGE, 6000, seed) for seed in (0, 1)]
    logp_NC = torch.linspace(-1, -9, LARGE).expand(TOKENS, LARGE).contiguous()

    def run() -> None:
        certain_overlap_events(ids[0], logp_NC, ids[1], logp_NC, LARGE - 16, 0.7, 1e-3, 6000)

    assert peak_bytes(run) < 2 * PER_ID * TOKENS * LARGE


@pytest.mark.parametrize("name", ["topk_forward_kl", "topk_reverse_kl"])
def test_an_objective_on_every_id_costs_the_same_bytes_an_id_at_any_vocabulary(name: str) -> None:
    """k = V; the chunk's 8 tokens × V logits are 4 bytes a number, and all pairs of ids would be V bytes each."""

    def per_id(vocab: int) -> float:
        case = make_case((8,)).leaves(torch.float32)
        draw = torch.Generator().manual_seed(0)
        case.student_weight = torch.randn(vocab, 8, generator=draw).requires_grad_()
        case.teacher_weight = torch.randn(vocab, 12, generator=draw)
        case.vocab_size = vocab
        run = lambda: case.fused(None, ObjectiveConfig(name, k=vocab))[0].backward()  # noqa: E731
        run()
        return peak_bytes(run) / 8 / vocab

    assert per_id(8000) < 1.1 * per_id(2000) < 400


# ---------------------------------------------------------------------------------------------------- the nucleus


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nucleus_of_1_is_all_k_ids_whatever_rounding_leaves_of_1(dtype: torch.dtype) -> None:
    """Worked by hand: the first id has all but 1e-12 of the mass, so that the second is behind a sum of 1."""
    teacher_logp_NK = torch.tensor([[1 - 1e-12, 1e-12, 0.0]], dtype=torch.float64).log().to(dtype)
    teacher_ids_NK = torch.tensor([[7, 3, 9]])
    for sampled, rejected in ((7, False), (3, False), (9, False), (4, True)):
        assert top_p_reject(torch.tensor([sampled]), teacher_ids_NK, teacher_logp_NK, 1.0).item() == rejected
    assert top_p_reject(torch.tensor([3]), teacher_ids_NK, teacher_logp_NK, 0.999).item()
