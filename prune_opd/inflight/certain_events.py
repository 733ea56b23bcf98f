"""Drift events that are certain, whatever rounding did to the scores (pure torch, no gradient).

In flight the student's top-k comes from the rollout engine, in the loss from the trainer, and their log-probabilities
differ in the last digits. Where two tokens score nearly the same around rank k, the two sides may order them
differently, and see an event or not. A response must never be cut where the loss would go on. So an event counts in
flight only if it is one for *every* outcome of the close calls: if each score is off by at most margin / 2, the events
counted here are a subset of the loss's, and R in flight is never below the loss's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prune_opd.method.gate import overlap_events, top_p_reject
from prune_opd.method.sets import among


def certain_overlap_events(
    student_ids_NC: Tensor,
    student_logp_NC: Tensor,
    teacher_ids_NC: Tensor,
    teacher_logp_NC: Tensor,
    k: int,
    threshold: float,
    margin: float | Tensor,
    vocab_size: int,
) -> Tensor:
    """Whether B_t = 1[O_t < γ] holds for every pair of top-k sets that the margin leaves open, bool [N].

    ids [N, C]: each model's C ≥ k most probable tokens; C = k only if k is the whole vocabulary. logp [N, C]: their
    log-probabilities (or logits), descending. margin: one for all, or each token's [N, 1].
    """
    student = _Membership(student_logp_NC, k, margin, vocab_size)
    teacher = _Membership(teacher_logp_NC, k, margin, vocab_size)
    student_shared_NC = among(student_ids_NC, teacher_ids_NC, teacher.possible_NC)
    teacher_shared_NC = among(teacher_ids_NC, student_ids_NC, student.possible_NC)
    most_N = torch.minimum(student.most(student_shared_NC, k), teacher.most(teacher_shared_NC, k))
    return overlap_events(most_N / k, k, threshold) & student.known_N & teacher.known_N


def certain_rejects(
    sampled_ids_N: Tensor, teacher_ids_NC: Tensor, teacher_logp_NC: Tensor, k: int, p: float, margin: float
) -> Tensor:
    """Whether B_t = 1[y ∉ nucleus] of `teacher_top_p` holds whatever the close calls, bool [N]; shapes as above.

    Two errors are allowed for: the cumulative probability may be too small by a factor of 1 + `margin`, and a token
    just outside the top k may belong inside.
    """
    rejected_N = top_p_reject(sampled_ids_N, teacher_ids_NC[:, :k], teacher_logp_NC[:, :k], min(p * (1 + margin), 1.0))
    beyond_NC = (teacher_ids_NC[:, k:] == sampled_ids_N[:, None]) & (
        teacher_logp_NC[:, k:] >= teacher_logp_NC[:, k - 1 : k] - margin
    )
    # Inside the top k, tokens closer than the margin may change order, and the sampled one may end up in the nucleus.
    at_N1 = (teacher_ids_NC == sampled_ids_N[:, None]).float().argmax(-1, keepdim=True)
    lifted_NC = teacher_logp_NC[:, :k] + margin
    lifted_NC = torch.where(torch.arange(k, device=at_N1.device) == at_N1, lifted_NC, teacher_logp_NC[:, :k])
    order_NC = lifted_NC.argsort(dim=-1, descending=True, stable=True)
    again_N = top_p_reject(
        sampled_ids_N,
        teacher_ids_NC[:, :k].gather(1, order_NC),
        teacher_logp_NC[:, :k].gather(1, order_NC),
        min(p * (1 + margin), 1.0),
    )
    return rejected_N & again_N & ~beyond_NC.any(-1)


def greatest_acceptance(
    student_ids_NC: Tensor, student_logp_NC: Tensor, teacher_logp_NC: Tensor, k: int, margin: float, vocab_size: int
) -> Tensor:
    """The largest acceptance Σ min(p, q) over the student's top k that the margin leaves open [N], at most 1.

    ids, logp [N, C] of the student, descending; teacher_logp [N, C]: the teacher's at the same ids. Whatever the top k
    is, it is among the C; where even the last of them may belong to it, nothing is known, and it is 1.
    """
    most_N = torch.minimum(student_logp_NC, teacher_logp_NC).exp().sum(-1) * math.exp(margin)
    known_N = _Membership(student_logp_NC, k, margin, vocab_size).known_N
    return torch.where(known_N, most_N.clamp(max=1), 1.0)


def greatest_kl(
    student_logp_NC: Tensor, teacher_logp_NC: Tensor, teacher_least_N: Tensor, margin: float, vocab_size: int
) -> Tensor:
    """The largest KL(p ‖ q) over the vocabulary that the margin leaves open [N], in nats.

    logp [N, C]: the student's best tokens, descending, and the teacher's at the same ids. teacher_least: the teacher's
    least log-probability of all. A token that is not among the C has at most p_C, and at most p_C / teacher_least of
    log-ratio. Scores that are off by margin / 2, of distributions that still sum to 1, move the KL by no more than
    margin · (Σ p |log p − log q| + Σ |p − q|), and by a term of second order.
    """
    outside = max(vocab_size - student_logp_NC.shape[1], 0)
    p_NC, q_NC, gap_NC = student_logp_NC.exp(), teacher_logp_NC.exp(), student_logp_NC - teacher_logp_NC
    terms_NC = (p_NC * gap_NC).nan_to_num(nan=0.0)  # 0 · ∞ of padding
    last_N = student_logp_NC[:, -1] + margin
    rest_N = outside * last_N.exp()
    apart_N = (p_NC - q_NC).abs().sum(-1) + (1 - q_NC.sum(-1)).clamp(min=0) + rest_N
    slack_N = margin * math.exp(margin) * (terms_NC.abs().sum(-1) + apart_N) + margin**2
    beyond_N = rest_N * (last_N - teacher_least_N + margin).clamp(min=0) if outside else rest_N
    return (terms_NC.sum(-1) + slack_N + beyond_N).clamp(min=0)


def one_end(ids_NC: Tensor, logp_NC: Tensor, ends: Sequence[int], temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates [N, C] with the terminal ids among them as one, the lowest of `ends`, in no order; and a slack [N, 1].

    Its score is T log Σ exp(logp / T): the sum of their probabilities at that temperature, as a logit. What is no
    candidate scores no more than the last that is. So the places that get free have that score, for tokens that may
    come up (their id is −1), and the class scores too low by at most the slack. Where no end is a candidate, the last
    candidate is raised to what all ends together may have, and stands for them, if it stays the last with that.
    """
    is_end_NC = torch.isin(ids_NC, torch.tensor(ends, device=ids_NC.device))
    found_N1, last_N1 = is_end_NC.sum(dim=1, keepdim=True), logp_NC.amin(dim=1, keepdim=True)
    of_ends_NC = logp_NC.masked_fill(~is_end_NC, float("-inf")) / temperature
    together_N1 = temperature * of_ends_NC.logsumexp(dim=1, keepdim=True)
    first_NC = is_end_NC & (is_end_NC.cumsum(dim=1) == 1)
    is_last_NC = torch.arange(logp_NC.shape[1], device=logp_NC.device) == logp_NC.argmin(dim=1, keepdim=True)
    most = temperature * math.log(len(ends))
    stands_N1 = (found_N1 == 0) & (last_N1 + most < logp_NC.kthvalue(2, dim=1, keepdim=True).values)
    logp_NC = torch.where(is_last_NC & stands_N1, logp_NC + most, logp_NC)
    logp_NC = torch.where(first_NC, together_N1, torch.where(is_end_NC, last_N1, logp_NC))
    missing_N1 = (len(ends) - found_N1) * ((last_N1 - together_N1) / temperature).exp()
    slack_N1 = torch.where(found_N1 > 0, temperature * missing_N1.log1p(), most * ~stands_N1)
    return ids_NC.masked_fill(first_NC, min(ends)).masked_fill(is_end_NC & ~first_NC, -1), logp_NC, slack_N1


class _Membership:
    """Which of the C candidates are in the top-k in every outcome, and which in some."""

    def __init__(self, logp_NC: Tensor, k: int, margin: float | Tensor, vocab_size: int) -> None:
        width = logp_NC.shape[1]
        self.possible_NC = logp_NC >= logp_NC[:, k - 1 : k] - margin
        if width > k:
            self.certain_NC = logp_NC > logp_NC[:, k : k + 1] + margin
        else:
            self.certain_NC = torch.ones_like(self.possible_NC)
        # Where even the last candidate may belong to the top k, so may tokens that are not among the candidates.
        all_known = width >= vocab_size
        self.known_N = torch.ones_like(self.possible_NC[:, 0]) if all_known else ~self.possible_NC[:, -1]

    def most(self, shared_NC: Tensor, k: int) -> Tensor:
        """How many of the top k can be among the `shared` candidates, at most."""
        forced_N = (self.certain_NC & shared_NC).sum(-1)
        open_N = k - self.certain_NC.sum(-1)
        return forced_N + torch.minimum(open_N, (self.possible_NC & ~self.certain_NC & shared_NC).sum(-1))
