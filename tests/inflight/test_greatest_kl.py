"""What may be known in flight of a token's KL: never less than what the loss may find."""

from __future__ import annotations

import pytest
import torch

from prune_opd.inflight.certain_events import greatest_kl

V, N = 40, 400


def bound(logp_NV: torch.Tensor, logq_NV: torch.Tensor, candidates: int, margin: float) -> torch.Tensor:
    top_NC, ids_NC = logp_NV.topk(candidates)
    return greatest_kl(top_NC, logq_NV.gather(1, ids_NC), logq_NV.amin(1), margin, V)


def pair(sharpness: float, apart: float) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    logits_NV = sharpness * torch.randn(N, V, generator=draw, dtype=torch.float64)
    other_NV = logits_NV + apart * torch.randn(N, V, generator=draw, dtype=torch.float64)
    return logits_NV.log_softmax(1), other_NV.log_softmax(1)


@pytest.mark.parametrize("candidates", (4, 16, V))
@pytest.mark.parametrize("margin", (0.0, 2e-3, 0.1))
@pytest.mark.parametrize(("sharpness", "apart"), ((1.0, 0.3), (8.0, 0.3), (8.0, 4.0)))
def test_no_scores_within_the_margin_have_a_higher_kl(
    sharpness: float, apart: float, margin: float, candidates: int
) -> None:
    logp_NV, logq_NV = pair(sharpness, apart)
    most_N = bound(logp_NV, logq_NV, candidates, margin)
    draw = torch.Generator().manual_seed(5)
    for _ in range(20):
        signs = [(torch.randint(0, 2, (N, V), generator=draw) * 2 - 1) * margin / 2 for _ in range(2)]
        p_NV, q_NV = ((logs + sign).log_softmax(1) for logs, sign in zip((logp_NV, logq_NV), signs, strict=True))
        kl_N = (p_NV.exp() * (p_NV - q_NV)).sum(1)
        assert (kl_N <= most_N + 1e-12).all()


def test_where_both_models_are_sure_of_one_token_the_bound_is_low() -> None:
    logp_NV, logq_NV = pair(1.0, 0.3)
    logp_NV[:, 0] += 25
    logq_NV[:, 0] += 25
    most_N = bound(logp_NV.log_softmax(1), logq_NV.log_softmax(1), 4, 2e-3)
    assert (most_N < 1e-4).all()


def test_of_the_whole_vocabulary_without_a_margin_it_is_the_kl() -> None:
    logp_NV, logq_NV = pair(2.0, 1.0)
    torch.testing.assert_close(bound(logp_NV, logq_NV, V, 0.0), (logp_NV.exp() * (logp_NV - logq_NV)).sum(1))
