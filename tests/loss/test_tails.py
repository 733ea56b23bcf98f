"""What becomes of the ids outside the support: the published form leaks mass to them, the others do not."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from prune_opd.config import ObjectiveConfig
from prune_opd.errors import ConfigError
from prune_opd.loss import Head, Method, Tokens, distill_loss
from prune_opd.method.objective import token_loss
from tests.loss.checks import assert_agrees
from tests.reference import GATE, OBJECTIVE, VOCAB, make_case

BUCKET, CENTRED = (dataclasses.replace(OBJECTIVE, tail=tail) for tail in ("bucket", "centred"))


def test_the_slopes_of_the_published_form_sum_to_its_divergence_and_those_of_the_centred_form_to_nothing() -> None:
    """Worked by hand: p = (.6, .2), q = (.3, .2), so w = (.75, .25) and δ = (log 2, 0)."""
    logs = torch.tensor([[0.6, 0.2]]).double().log(), torch.tensor([[0.3, 0.2]]).double().log()
    one = torch.ones(1).double()
    published, centred = (token_loss(objective, *logs, one) for objective in (OBJECTIVE, CENTRED))
    mean = 0.75 * math.log(2)
    assert published.grad_logp_NK.sum().item() == pytest.approx(mean)
    assert centred.grad_logp_NK.tolist()[0] == pytest.approx([0.75 * (math.log(2) - mean), -0.25 * mean])
    # KL of (.75, .25) and (.6, .4)
    assert centred.divergence_N.item() == pytest.approx(0.75 * math.log(0.75 / 0.6) + 0.25 * math.log(0.25 / 0.4))


def test_the_bucket_is_the_kl_of_the_coarser_distribution() -> None:
    """Worked by hand: p = (.6, .2 | .2), q = (.3, .2 | .5)."""
    logs = torch.tensor([[0.6, 0.2]]).double().log(), torch.tensor([[0.3, 0.2]]).double().log()
    rest = torch.tensor([0.2]).double().log(), torch.tensor([0.5]).double().log()
    got = token_loss(BUCKET, *logs, torch.ones(1).double(), log_rest=rest)
    assert got.divergence_N.item() == pytest.approx(0.6 * math.log(2) + 0.2 * math.log(0.4))
    assert got.grad_logp_NK.tolist()[0] == pytest.approx([0.6 * (math.log(2) - math.log(0.4)), -0.2 * math.log(0.4)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("objective", [BUCKET, dataclasses.replace(BUCKET, support="union"), CENTRED])
def test_a_tail_of_a_millionth_of_a_millionth_has_the_right_value_and_gradient(
    objective: ObjectiveConfig, dtype: torch.dtype
) -> None:
    """1 − p has no digits of it left in float32; the sum over the rest has."""
    case = make_case()
    case.student_hidden, case.teacher_hidden = 8 * case.student_hidden, 9 * case.teacher_hidden
    assert_agrees(case, GATE, objective, dtype, 1e-9 if dtype == torch.float64 else 2e-5, chunk=7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_support_of_every_id_leaves_no_rest_and_is_the_full_kl(dtype: torch.dtype) -> None:
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    stats = assert_agrees(make_case(), GATE, dataclasses.replace(BUCKET, k=VOCAB), dtype, tolerance)
    assert torch.allclose(stats.divergence_N, stats.reverse_kl_N, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_bucket_is_between_nothing_and_the_full_kl(seed: int) -> None:
    stats = make_case(seed=seed).fused(objective=BUCKET)[2]
    assert (stats.divergence_N > 0).all() and (stats.divergence_N <= stats.reverse_kl_N + 1e-12).all()


def pull_outside(objective: ObjectiveConfig) -> list[float]:
    """What a step of descent does to the last two of four logits, over their probabilities."""
    student_V, teacher_V = (torch.tensor([p]).double().log() for p in ([0.6, 0.1, 0.2, 0.1], [0.2, 0.7, 0.09, 0.01]))
    student_V.requires_grad_()
    batch = Tokens(torch.zeros(1, dtype=torch.long), [0, 1], 4)
    eye = torch.eye(4).double()
    distill_loss(Head(student_V, eye), Head(teacher_V, eye), batch, Method(None, objective))[0].backward()
    assert student_V.grad is not None
    return (-student_V.grad[0, 2:] / torch.tensor([0.2, 0.1]).double()).tolist()


def test_the_published_form_raises_what_lies_outside_whatever_the_teacher_says_of_it() -> None:
    """Worked by hand: p = (.6, .1 | .2, .1), q = (.2, .7 | .09, .01): too much mass is there already."""
    divergence = 6 / 7 * math.log(3) + 1 / 7 * math.log(1 / 7)
    two = ObjectiveConfig(k=2, support="teacher")  # the first two ids
    assert pull_outside(two) == pytest.approx([divergence, divergence])  # both alike, and up
    # Σ c = .6 (log 3 − log 3) + .1 (log 1/7 − log 3)
    assert pull_outside(dataclasses.replace(two, tail="bucket")) == pytest.approx([0.1 * math.log(1 / 21)] * 2)  # down
    assert pull_outside(dataclasses.replace(two, tail="centred")) == pytest.approx([0.0, 0.0], abs=1e-12)
    gaps = [math.log(p / q) for p, q in ((0.6, 0.2), (0.1, 0.7), (0.2, 0.09), (0.1, 0.01))]
    kl = 0.6 * gaps[0] + 0.1 * gaps[1] + 0.2 * gaps[2] + 0.1 * gaps[3]
    full = pull_outside(ObjectiveConfig("full_vocab_reverse_kl", k=2))
    assert full == pytest.approx([kl - gaps[2], kl - gaps[3]])  # each by what the teacher says


@pytest.mark.parametrize("name", ["none", "bucket", "centred", "full_vocab_reverse_kl"])
def test_a_truncated_objective_ends_with_its_own_divergence_gone_and_the_full_kl_shows_what_it_has_not_seen(
    name: str,
) -> None:
    """Adam on free logits over 400 ids, a vocabulary in which 16 are far from all the mass."""
    full = name == "full_vocab_reverse_kl"
    objective = ObjectiveConfig(name) if full else ObjectiveConfig(tail=name)
    generator = torch.Generator().manual_seed(0)
    tokens, vocab = 8, 400
    ranks = torch.arange(1, vocab + 1).log()
    teacher_NV = -1.2 * torch.stack([ranks[torch.randperm(vocab, generator=generator)] for _ in range(tokens)])
    student_NV = (teacher_NV + torch.randn(tokens, vocab, generator=generator)).requires_grad_()
    eye_VV, batch = torch.eye(vocab), Tokens(torch.zeros(tokens, dtype=torch.long), [0, tokens], vocab)
    adam, seen = torch.optim.Adam([student_NV], lr=0.05), []
    for _ in range(100):
        method = Method(None, objective)
        loss, count, stats = distill_loss(Head(student_NV, eye_VV), Head(teacher_NV, eye_VV), batch, method)
        seen.append((stats.divergence_N.mean().item(), stats.reverse_kl_N.mean().item()))
        adam.zero_grad()
        (loss / count).backward()
        adam.step()
    (divergence, kl), (last_divergence, last_kl) = seen[0], seen[-1]
    assert last_divergence < 0.02 * divergence
    assert last_kl < 0.02 * kl if full else last_kl > 0.25 * kl


def test_a_bucket_of_other_weights_and_a_tail_of_another_objective_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"objective\.weight = teacher_p .*objective\.weight=student_p"):
        ObjectiveConfig(tail="bucket", weight="teacher_p")
    with pytest.raises(ConfigError, match=r"objective\.tail = 'bucket' is a setting of topk_reverse_kl"):
        ObjectiveConfig("sampled_token", tail="bucket")
