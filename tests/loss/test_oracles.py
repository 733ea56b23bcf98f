"""The fused loss against what the release and its peers compute (oracles.py), on hundreds of random cases.

From hidden states to both gradients: vocabularies of 7 to 509 ids, odd and prime ones too, k from 1 to all of them,
responses of 0, 1 and more tokens, models of different widths and paddings, temperatures, chunks that do not divide.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from prune_opd.config import GateConfig, ObjectiveConfig, WeightingConfig
from prune_opd.loss import GateStats
from tests.loss.oracles import PEERS, Peer, released
from tests.reference import SUPPORTS, Case

TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5}
DTYPES = (torch.float64, torch.float32)


def random_case(random: Random) -> Case:
    """Numbers that fp32 has exactly, so that both dtypes see the same models."""
    vocab = random.choice([7, 16, 31, 64, 101, 256, 509])
    lengths = [random.choice([0, 1, 2, 5, 11]) for _ in range(random.randint(1, 4))] + [3]
    tokens, width, more = sum(lengths), random.choice([3, 8]), random.choice([0, 2])
    generator = torch.Generator().manual_seed(random.randrange(2**31))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    student_hidden, student_weight = normal(tokens, width), normal(vocab + random.choice([0, 3]), width)
    teacher_weight = torch.cat([student_weight[:vocab], normal(random.choice([0, 5]), width)])
    teacher_weight = torch.cat([teacher_weight, normal(len(teacher_weight), more)], 1)
    drift = random.choice([0.1, 0.5]) * normal(tokens, width)
    teacher_hidden = torch.cat([student_hidden + drift, normal(tokens, more)], 1)
    return Case(
        *(part.float().double() for part in (student_hidden, student_weight, teacher_hidden, teacher_weight)),
        sampled=torch.randint(vocab, (tokens,), generator=generator),
        offsets=[0, *torch.tensor(lengths).cumsum(0).tolist()],
        vocab_size=vocab,
    )


def random_k(random: Random, vocab: int) -> int:
    return min(random.choice([1, 2, 4, 10, 16, 20, vocab]), vocab)


def logits_of(case: Case) -> tuple[Tensor, Tensor]:
    size = case.vocab_size
    teacher_NV = case.teacher_hidden @ case.teacher_weight[:size].T
    return case.student_hidden @ case.student_weight[:size].T, teacher_NV


def padded(packed_N: Tensor, offsets: list[int]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([packed_N[a:b] for a, b in pairwise(offsets)], batch_first=True)


def assert_same_gradients(ours: Case, theirs: Case, loss: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Relative to the largest entry; where hardly anything is left of terms that cancel, to a thousandth of 1."""
    loss.backward()
    expected.backward()
    for got, right in zip(ours.gradients(), theirs.gradients(), strict=True):
        scale = max(right.abs().max().item(), 1e-3)
        assert (got.double() - right).abs().max() <= TOLERANCE[dtype] * scale


# ---------------------------------------------------------------------------------------------------- the release


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(120))
def test_gate_and_loss_are_those_of_the_release(seed: int, dtype: torch.dtype) -> None:
    random = Random(seed)
    case = random_case(random)
    k = random_k(random, case.vocab_size)
    gate = GateConfig(
        random.choice(["overlap", "overlap", "teacher_top_p"]),  # type: ignore[arg-type]
        k=k,
        threshold=random.choice([0.3, 0.5, 0.7, 0.9, 1.0]),
        w_drop=random.choice([0.0, 0.01, 0.1, 0.25, 1.0]),
        w_base=random.choice([0.0, 0.5, 1.0]),
        weight_normalisation=random.choice(["none", "base"]),  # type: ignore[arg-type]
        top_p=random.choice([0.5, 0.95, 1.0]),
    )
    objective = ObjectiveConfig(
        k=k,
        support=random.choice(SUPPORTS),  # type: ignore[arg-type]
        weight=random.choice(["student_p", "teacher_p", "none"]),  # type: ignore[arg-type]
        temperature=random.choice([0.7, 1.0, 2.0]),
    )
    ours, theirs = case.leaves(dtype), case.leaves(torch.float64)
    loss, _, stats = ours.fused(gate, objective, chunk=random.choice([1, 3, 1024]))
    offsets, (student_NV, teacher_NV) = case.offsets, logits_of(theirs)
    rows = [padded(part, offsets) for part in (student_NV, teacher_NV, case.sampled)]
    mask_BT = padded(torch.ones(len(case.sampled), dtype=torch.bool), offsets)
    found = released(*rows, mask_BT, gate, objective)
    assert torch.equal(stats.event_N, found.event_BT[mask_BT])
    assert torch.equal(stats.overlap_N.double(), found.overlap_BT[mask_BT].float().double())
    assert torch.equal(stats.reliable_length_B, found.reliable_length_B)
    torch.testing.assert_close(stats.weight_N.double(), found.weight_BT[mask_BT], rtol=1e-6, atol=1e-7)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        stats.divergence_N.double(), -found.reward_BT[mask_BT], rtol=tolerance, atol=10 * tolerance
    )
    assert_same_gradients(ours, theirs, loss, found.loss_sum, dtype)


# ---------------------------------------------------------------------------------------------------- the peers


def with_peer(seed: int, peer: Peer, dtype: torch.dtype, **options: Any) -> tuple[GateStats, Tensor]:
    """Both losses of a random case and their gradients; what is left to compare: our statistics, their values."""
    random = Random(seed)
    case = random_case(random)
    k = random_k(random, case.vocab_size - 1)
    objective = dataclasses.replace(peer.objective(k), temperature=random.choice([0.7, 1.0, 2.0]))
    ours, theirs = case.leaves(dtype), case.leaves(torch.float64)
    loss, _, stats = ours.fused(None, objective, chunk=random.choice([1, 3, 1024]), **options)
    student_NV, teacher_NV = (logits_NV / objective.temperature for logits_NV in logits_of(theirs))
    value_N = peer.loss(student_NV, teacher_NV.detach(), case.sampled, objective)
    assert_same_gradients(ours, theirs, loss, value_N.sum(), dtype)
    return stats, value_N.detach()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
def test_an_objective_is_that_of_its_peers(peer: Peer, seed: int, dtype: torch.dtype) -> None:
    stats, value_N = with_peer(seed, peer, dtype)
    if not peer.surrogate:
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(stats.divergence_N.double(), value_N, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("discount", [0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_discounted_credit_is_that_of_its_peers(seed: int, discount: float) -> None:
    """Log-ratios summed from the end of each response, as an advantage (tinker's cookbook, MiniLLM)."""
    case = random_case(Random(seed))
    ours, theirs = case.leaves(torch.float64), case.leaves(torch.float64)
    loss = ours.fused(None, ObjectiveConfig("sampled_token", k=2, discount=discount), chunk=3)[0]
    student_NV, teacher_NV = logits_of(theirs)
    y = case.sampled.unsqueeze(-1)
    logp_N, logq_N = (logits.log_softmax(-1).gather(-1, y).squeeze(-1) for logits in (student_NV, teacher_NV))
    expected = torch.zeros(())
    for begin, end in pairwise(case.offsets):
        future = 0.0
        for t in reversed(range(begin, end)):
            future = float((logq_N[t] - logp_N[t]).detach()) + discount * future
            expected = expected - future * (logp_N[t] - logp_N[t].detach()).exp()
    assert_same_gradients(ours, theirs, loss, expected, torch.float64)


@pytest.mark.parametrize("gamma", [0.5, 1.5])
@pytest.mark.parametrize("seed", range(5))
def test_iw_opd_is_that_of_its_peers(seed: int, gamma: float) -> None:
    """Weights by the share of |A| that is still to come, of the sampled token's policy gradient (TRL's trainer)."""
    case = random_case(Random(seed))
    ours, theirs = case.leaves(torch.float64), case.leaves(torch.float64)
    loss = ours.fused(None, ObjectiveConfig("sampled_token", k=2), WeightingConfig("iw_opd", gamma=gamma), chunk=3)[0]
    student_NV, teacher_NV = logits_of(theirs)
    y = case.sampled.unsqueeze(-1)
    logp_N, logq_N = (logits.log_softmax(-1).gather(-1, y).squeeze(-1) for logits in (student_NV, teacher_NV))
    advantage_N, expected = (logq_N - logp_N).detach(), torch.zeros(())
    for begin, end in pairwise(case.offsets):
        size_T = advantage_N[begin:end].abs()
        reached_T = torch.cat([torch.zeros(1).double(), size_T.cumsum(0)[:-1]])[: len(size_T)]
        weight_T = 1 + gamma * (1 - reached_T / size_T.sum())
        expected = expected - (weight_T * advantage_N[begin:end] * logp_N[begin:end]).sum()
    assert_same_gradients(ours, theirs, loss, expected, torch.float64)
