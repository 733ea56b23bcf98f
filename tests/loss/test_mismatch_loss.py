"""The correction of `objective.mismatch` in the loss: of every objective, and never of the gate's weights."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from prune_opd.config import ObjectiveConfig, WeightingConfig
from prune_opd.loss import Head, Method, Tokens, distill_loss
from tests.reference import GATE, OBJECTIVE, make_case

OBJECTIVES: list[dict[str, Any]] = [
    {"name": "sampled_token"},
    {"name": "topk_reverse_kl", "k": 5},
    {"name": "topk_forward_kl", "k": 5},
    {"name": "local_support_matching", "k": 5},
    {"name": "full_vocab_reverse_kl"},
    {"name": "full_vocab_jsd"},
]
ENTROPY_AWARE = WeightingConfig("entropy_aware", entropy_threshold=0.5, forward_k=4)


@pytest.mark.parametrize("mismatch", ["truncated", "masked"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective["name"])
def test_loss_and_gradient_are_those_of_the_corrected_tokens(objective: dict[str, Any], mismatch: str) -> None:
    case = make_case().stale().mismatched()
    config = ObjectiveConfig(**objective, mismatch=mismatch)
    got, expected = case.leaves(torch.float64), case.leaves(torch.float64)
    loss, _, stats = got.fused(objective=config, weighting=ENTROPY_AWARE, chunk=7)
    reference = expected.reference(objective=config, weighting=ENTROPY_AWARE)
    loss.backward()
    reference.loss_sum.backward()
    for mine, theirs in zip(got.gradients(), expected.gradients(), strict=True):
        torch.testing.assert_close(mine, theirs)
    plain = case.leaves(torch.float64).fused(objective=ObjectiveConfig(**objective), weighting=ENTROPY_AWARE, chunk=7)
    assert not math.isclose(float(loss), float(plain[0]), rel_tol=1e-3), "the case has something to correct"
    torch.testing.assert_close(stats.weight_N, plain[2].weight_N)
    torch.testing.assert_close(stats.reliability_N, plain[2].reliability_N)
    assert torch.equal(stats.event_N, plain[2].event_N)
    assert torch.equal(stats.reliable_length_B, plain[2].reliable_length_B)


def test_a_kept_policy_holds_the_correction_for_later_updates() -> None:
    case, config = make_case().mismatched(), ObjectiveConfig(name="sampled_token", mismatch="masked")
    first = case.leaves(torch.float64)
    loss, _, stats = first.fused(objective=config, policy="keep")
    loss.backward()
    again = case.leaves(torch.float64)
    later, *_ = again.fused(objective=config, policy=stats.policy)
    later.backward()
    for mine, theirs in zip(first.gradients(), again.gradients(), strict=True):
        torch.testing.assert_close(mine, theirs)  # before the first update the ratio to it is 1


@pytest.mark.parametrize("mismatch", ["truncated", "masked"])
def test_the_estimate_of_a_sampled_token_becomes_that_of_the_trainers_policy(mismatch: str) -> None:
    """The mean over the engine's distribution, of w times the token's gradient, is the trainer's: exact sums."""
    case = make_case()
    vocab = case.vocab_size
    config = ObjectiveConfig(name="sampled_token", mismatch=mismatch, mismatch_low=1e-6, mismatch_high=1e6)
    logits_V = (case.student_hidden[0].double() @ case.student_weight[:vocab].double().T).detach()
    trainer_V = logits_V.log_softmax(-1)
    engine_V = (logits_V + torch.linspace(-1, 1, vocab).double()).log_softmax(-1)

    def mean_gradient(weights_V: torch.Tensor, settings: ObjectiveConfig) -> torch.Tensor:
        total = torch.zeros_like(case.student_hidden[:1], dtype=torch.float64)
        for token in range(vocab):
            one = make_case()
            one.student_hidden, one.teacher_hidden = one.student_hidden[:1], one.teacher_hidden[:1]
            one.sampled, one.offsets = torch.tensor([token]), [0, 1]
            one.engine_logp = engine_V[token : token + 1]
            one = one.leaves(torch.float64)
            one.fused(gate=None, objective=settings)[0].backward()
            total += weights_V[token] * one.gradients()[0]
        return total

    right = mean_gradient(trainer_V.exp(), ObjectiveConfig(name="sampled_token"))
    torch.testing.assert_close(mean_gradient(engine_V.exp(), config), right)
    wrong = mean_gradient(engine_V.exp(), ObjectiveConfig(name="sampled_token"))
    assert (wrong - right).abs().max() > 0.05 * right.abs().max(), "without it the engine's policy is taken"


def test_what_does_not_fit_is_named() -> None:
    case = make_case()
    with pytest.raises(ValueError, match=r"objective.mismatch = masked and no engine_logp: give the rollout engine's"):
        case.fused(objective=ObjectiveConfig(k=4, mismatch="masked"))
    case.engine_logp = torch.zeros(3)
    with pytest.raises(ValueError, match=r"engine_logp is \[3\] and sampled_ids \[24\]"):
        case.fused()


def test_stale_tokens_count_as_others_where_they_are_not_to_be_corrected() -> None:
    """Semi-OPD's form: the same loss as of fresh tokens, while the statistics still say how stale they are."""
    case = make_case().stale()
    fresh = dataclasses.replace(case, stale_logp=None).fused(chunk=7)
    head, teacher = Head(case.student_hidden, case.student_weight), Head(case.teacher_hidden, case.teacher_weight)
    tokens = Tokens(case.sampled, case.offsets, case.vocab_size, stale_logp_N=case.stale_logp)
    loss, _, stats = distill_loss(head, teacher, tokens, Method(GATE, OBJECTIVE, correct_stale=False), chunk=7)
    assert loss == fresh[0] and torch.equal(stats.weight_N, fresh[2].weight_N)
    assert loss != case.fused(chunk=7)[0]
    assert stats.stale_ratio_N is not None and stats.stale_ratio_N.nansum() > 0
