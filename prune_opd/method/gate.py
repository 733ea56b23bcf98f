"""The drift gate of Prune-OPD (arXiv 2605.07804 §3): how far into a response the teacher can still be trusted.

    top-k of both models ─▶ O_t overlap ─▶ B_t event ─▶ C_t events so far ─▶ R_t reliability ─▶ W_t weight
                                                                              └─▶ E_i reliable length
    └────────────────── `judge` ───────────────────┘ └──────────── `apply_gate`, `PackedGate` ───────────┘

The gate is causal and never recovers: C only counts up along a response, so R and W only fall. `judge` looks at each
token alone. `apply_gate` counts along whole responses as padded rows; `PackedGate` takes them packed end to end and in
pieces, as the loss sees them. Both use the one formula in `_reliability` and `_weight`. Nothing here has a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from prune_opd.config import GateConfig
from prune_opd.method.packed import Pieces
from prune_opd.method.sets import among, count_among

RELIABLE_ABOVE = 1e-8  # ε of the paper: a token counts as reliable while R_t > ε


class Views(NamedTuple):
    """What both models find probable at some tokens: top-k ids, most probable first, and full-vocabulary logs there."""

    sampled_ids: Tensor  # y, integer [...]
    student_ids: Tensor  # [..., k]
    logp: Tensor  # log p and log q at student_ids, [2, ..., k]
    teacher_ids: Tensor  # [..., k]
    teacher_logp: Tensor | None  # log q at teacher_ids, where `needs_nucleus`


class Agreement(NamedTuple):
    """How far both models agree on each token. Padded: [B, T]; packed: [N]."""

    overlap: Tensor  # O, float32, 0..1
    event: Tensor  # B, bool
    student_mass: Tensor  # Σ p over the student's top k
    teacher_mass: Tensor  # Σ q there
    acceptance: Tensor  # Σ min(p, q) there: the share of the student's tokens that the teacher would accept


class Gate(NamedTuple):
    """What the gate says. Padded: reliability and weight are [B, T]; packed: [N]. reliable_length is always [B]."""

    reliability_BT: Tensor  # R, 1 → 0
    weight_BT: Tensor  # W, 0 outside the response
    reliable_length_B: Tensor  # E, int64, in tokens


def judge(views: Views, gate: GateConfig | None) -> Agreement:
    """Overlap O, event B and shared mass of every token (Prune-OPD §3.1, method.md §2 and §7).

        overlap          B_t = 1[O_t < γ],  O_t = |K^S ∩ K^T| / k
        teacher_top_p    B_t = 1[y_t outside the teacher's nucleus]
        acceptance       B_t = 1[Σ_{v ∈ K^S} min(p_v, q_v) < γ]: ours, blind to the order of a tail that has no mass
        shared_mass      B_t = 1[Σ_{v ∈ K^S ∩ K^T} p_v < γ]: ours
        change_point     not from a token alone: `ChangePoint` makes it of the acceptance, and there is none here
        kl_agreement     the same: `AgreementTrap` makes it of the KL
        overlap_quantile overlap, once the pair's γ is known (`calibration.in_force`), and there is none here

    views: with k = gate.k. With gate None any k will do, and nothing is an event. ValueError when the shapes do not
    fit together.
    """
    shared_BT, k = _shared(views.student_ids, views.teacher_ids), views.student_ids.shape[-1]
    p_2BTK = views.logp.exp()
    student_mass_BT, teacher_mass_BT = p_2BTK.sum(-1)
    acceptance_BT = p_2BTK.amin(0).sum(-1)
    if gate is None or gate.along or gate.metric == "overlap_quantile":
        event_BT = torch.zeros_like(shared_BT, dtype=torch.bool)
    elif gate.metric == "overlap":
        event_BT = shared_BT < _enough(k, gate.threshold)
    elif gate.metric == "acceptance":
        event_BT = acceptance_BT < gate.threshold
    elif gate.metric == "shared_mass":
        event_BT = (p_2BTK[0] * among(views.student_ids, views.teacher_ids)).sum(-1) < gate.threshold
    else:
        assert views.teacher_logp is not None
        event_BT = top_p_reject(views.sampled_ids, views.teacher_ids, views.teacher_logp, gate.top_p)
    return Agreement(shared_BT.float() / k, event_BT, student_mass_BT, teacher_mass_BT, acceptance_BT)


def needs_nucleus(gate: GateConfig | None) -> bool:
    """Whether the gate asks how probable the teacher's own top-k ids are."""
    return gate is not None and gate.metric == "teacher_top_p"


def overlap_ratio(student_ids_BTK: Tensor, teacher_ids_BTK: Tensor) -> Tensor:
    """Top-k overlap O = |K^S ∩ K^T| / k, float32, of two sets of k distinct token ids each (Prune-OPD §3.1).

    student_ids_BTK, teacher_ids_BTK: integer [..., k], any order within the k. Returns overlap_BT [...], 0..1.
    ValueError when the shapes differ or k is 0.
    """
    return _shared(student_ids_BTK, teacher_ids_BTK).float() / student_ids_BTK.shape[-1]


def _shared(student_ids_BTK: Tensor, teacher_ids_BTK: Tensor) -> Tensor:
    """|K^S ∩ K^T|, int64. ValueError when the shapes do not fit together."""
    if student_ids_BTK.shape != teacher_ids_BTK.shape or student_ids_BTK.ndim == 0 or student_ids_BTK.shape[-1] == 0:
        raise ValueError(
            f"student_ids {list(student_ids_BTK.shape)} and teacher_ids {list(teacher_ids_BTK.shape)} "
            "must have the same shape, with the k ≥ 1 ids of a token last"
        )
    return count_among(student_ids_BTK, teacher_ids_BTK)


def overlap_events(overlap_BT: Tensor, k: int, threshold: float) -> Tensor:
    """B = 1[O < γ], strict, bool, of overlaps that are multiples of 1/k (Prune-OPD §3.1; γ is `threshold`).

    Compared as whole numbers of shared ids, with γ read as the decimal that was written: 7 of 10 against γ = 0.7 is no
    event, whichever way 0.7 rounds in float32. At k = 16 and γ = 0.7, 11 shared ids are an event and 12 are not.
    """
    return torch.round(overlap_BT * k) < _enough(k, threshold)


def _enough(k: int, threshold: float) -> int:
    """The least number of shared ids that is no event."""
    return math.ceil(Fraction(str(float(threshold))) * k)


def top_p_reject(sampled_ids_BT: Tensor, teacher_ids_BTK: Tensor, teacher_logp_BTK: Tensor, p: float) -> Tensor:
    """B = 1[y ∉ nucleus of the teacher], bool: the `teacher_top_p` metric (Prune-OPD, method.md §2).

    The accept set is the teacher's tokens in descending order up to **and including** the first at which their
    cumulative probability reaches p, and all k of them when it never does. p = 1 is all k: what rounding leaves of 1
    is no reason to stop before.

    sampled_ids_BT: integer [...]. teacher_ids_BTK: integer [..., k], most probable first. teacher_logp_BTK: their
    full-vocabulary log-probabilities [..., k]. ValueError when the shapes do not fit together.
    """
    if teacher_ids_BTK.shape != teacher_logp_BTK.shape or teacher_ids_BTK.shape[:-1] != sampled_ids_BT.shape:
        raise ValueError(
            f"sampled_ids {list(sampled_ids_BT.shape)}, teacher_ids {list(teacher_ids_BTK.shape)} and teacher_logp "
            f"{list(teacher_logp_BTK.shape)} do not fit: the last two need one shape, with k after the first's"
        )
    if teacher_logp_BTK.dtype != torch.float64:
        teacher_logp_BTK = teacher_logp_BTK.float()
    # A few roundings of slack, so that 0.5 + 0.3 + 0.15 does reach 0.95.
    reach = p - 8 * torch.finfo(teacher_logp_BTK.dtype).eps if p < 1 else math.inf
    probability_BTK = teacher_logp_BTK.double().exp()
    before_BTK = probability_BTK.cumsum(-1) - probability_BTK
    accepted_BTK = before_BTK < reach
    accepted_BTK[..., 0] = True  # the first token reaches any p that the slack has brought to 0
    return ~((teacher_ids_BTK == sampled_ids_BT.unsqueeze(-1)) & accepted_BTK).any(-1)


def apply_gate(event_BT: Tensor, valid_BT: Tensor, gate: GateConfig, dtype: torch.dtype = torch.float32) -> Gate:
    """Events of whole responses to reliability R, weight W and reliable length E (Prune-OPD §3.2).

        C_t = Σ_{i≤t} B_i · valid_i      inclusive: an event also down-weights its own token
        R_t = clip(1 − w_drop · C_t, 0, 1)
        W_t = (R_t + w_base) · valid_t   over 1 + w_base (`base`) or over the response's own mean W (`mean`)
        E_i = #{t valid : R_t > 1e-8}

    Without `gate.memory`, an ablation of ours, C_t is B_t: one event costs its own token and no other.

    event_BT, valid_BT: bool (or 0/1) [B, T]; where valid is false (prompt, padding) an event does not count and the
    weight is 0. Returns reliability_BT, weight_BT in `dtype`, reliable_length_B int64. ValueError when shapes differ.
    """
    if event_BT.shape != valid_BT.shape:
        raise ValueError(f"event {list(event_BT.shape)} and valid {list(valid_BT.shape)} must have the same shape")
    valid_BT = valid_BT.bool()
    count_BT = event_BT.bool() & valid_BT
    count_BT = count_BT.cumsum(-1) if gate.memory else count_BT.long()
    reliability_BT = _reliability(count_BT, gate)
    weight_BT = _weight(reliability_BT, gate) * valid_BT
    if gate.weight_normalisation == "mean":
        total_B1, tokens_B1 = weight_BT.sum(-1, keepdim=True), valid_BT.sum(-1, keepdim=True)
        weight_BT = weight_BT / _mean_or_one(total_B1, tokens_B1)
    reliable_length_B = ((reliability_BT > RELIABLE_ABOVE) & valid_BT).sum(-1)
    return Gate(reliability_BT.to(dtype), weight_BT.to(dtype), reliable_length_B)


class PackedGate:
    """`apply_gate` for B responses packed end to end into N tokens, fed in order and in pieces of any size.

    The running count C starts again at every boundary in cu_seqlens. A response may be empty. With gate None every
    token is reliable and has weight 1 (plain on-policy distillation).

    cu_seqlens: B + 1 offsets on the host, from 0 to N, not decreasing. dtype: of reliability and weight.
    """

    def __init__(
        self,
        cu_seqlens: Sequence[int],
        gate: GateConfig | None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype, self._pieces = dtype, Pieces(cu_seqlens, device)
        self._memory = gate is None or gate.memory
        self._events_N1 = torch.zeros(len(self._pieces.response_N) + 1, dtype=torch.int64, device=device)  # before each
        # R and W of every count that there can be: a look-up instead of a dozen small steps.
        reliability_C = _reliability(torch.arange(self._pieces.longest + 1), gate)
        self._reliability_C = reliability_C.to(device, dtype)
        self._weight_C = _weight(reliability_C, gate).to(device, dtype)

    def advance(self, event_C: Tensor) -> tuple[Tensor, Tensor]:
        """The next tokens' events, bool [C], to their reliability_C and weight_C.

        The weight is that of `none` or `base`; `mean` needs whole responses: see `apply_gate_packed`.
        """
        count_C = self._count(event_C)
        return self._reliability_C[count_C], self._weight_C[count_C]

    def weigh(self, event_C: Tensor) -> Tensor:
        """The weight alone."""
        return self._weight_C[self._count(event_C)]

    def _count(self, event_C: Tensor) -> Tensor:
        """C of the next tokens: the events up to and with each, less those before its response."""
        part = self._pieces.next(len(event_C))
        so_far_C = self._events_N1[part.start + 1 : part.stop + 1]
        if not self._memory:
            return event_C.long()
        torch.cumsum(event_C, 0, out=so_far_C).add_(self._events_N1[part.start])
        return so_far_C - self._events_N1[self._pieces.start_N[part]]

    def divide_by_mean(self, weight_N: Tensor) -> Tensor:
        """W over the mean W of its own response: no other response, micro-batch or rank has a part in it."""
        length_B, response_N = self._pieces.length_B, self._pieces.response_N
        total_B = torch.zeros(len(length_B), dtype=torch.float64, device=weight_N.device)
        total_B.index_add_(0, response_N, weight_N.double())
        return (weight_N.double() / _mean_or_one(total_B, length_B)[response_N]).to(self.dtype)

    def reliable_length(self, reliability_N: Tensor) -> Tensor:
        """E_i = #{t : R_t > 1e-8} of every response, int64 [B]."""
        length_B = torch.zeros_like(self._pieces.length_B)
        return length_B.index_add_(0, self._pieces.response_N, (reliability_N > RELIABLE_ABOVE).long())


def apply_gate_packed(
    event_N: Tensor, cu_seqlens: Sequence[int], gate: GateConfig | None, dtype: torch.dtype = torch.float32
) -> Gate:
    """`apply_gate` for packed responses, all tokens at once: event_N bool [N] to R [N], W [N] and E [B]."""
    packed = PackedGate(cu_seqlens, gate, event_N.device, torch.float64)
    reliability_N, weight_N = packed.advance(event_N)
    if gate is not None and gate.weight_normalisation == "mean":
        weight_N = packed.divide_by_mean(weight_N)
    return Gate(reliability_N.to(dtype), weight_N.to(dtype), packed.reliable_length(reliability_N))


def _reliability(count: Tensor, gate: GateConfig | None) -> Tensor:
    """R of C, in float64. R is set to 0 where the events are spent: 1 − w_drop · C could leave 1e-17 there."""
    if gate is None or gate.w_drop == 0:
        return torch.ones_like(count, dtype=torch.float64)
    # 1 / w_drop carries a rounding, which must not cost (or give) an event: 1 / 0.01 events, not 101.
    spent = math.ceil(min(1 / gate.w_drop, 1e15) * (1 - 1e-12))
    return (1 - gate.w_drop * count.double()).clamp(min=0).masked_fill(count >= spent, 0)


def _weight(reliability: Tensor, gate: GateConfig | None) -> Tensor:
    """W of R, in the dtype of R; `mean` is left to the caller, who has the whole response."""
    if gate is None:
        return torch.ones_like(reliability)
    weight = reliability + gate.w_base
    return weight / (1 + gate.w_base) if gate.weight_normalisation == "base" else weight


def _mean_or_one(total: Tensor, tokens: Tensor) -> Tensor:
    """total / tokens, or 1 where the total is 0: an empty response, or one whose every weight is 0 and stays 0."""
    return torch.where(total > 0, total / tokens.clamp(min=1), 1.0)
