"""What the gate saw: of one call of the loss, and of the global batch, added up over micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.loss.chunk import ChunkLoss, Scores
from prune_opd.loss.ends import end_record
from prune_opd.loss.inputs import Method, Tokens, raise_if_broken
from prune_opd.loss.mismatch import Mismatch
from prune_opd.loss.old_policy import OldPolicy
from prune_opd.loss.vocab_sums import VocabSums
from prune_opd.method.gate import apply_gate_packed
from prune_opd.method.objective import Candidates

PER_TOKEN = ("overlap", "event", "weight", "divergence")  # kept of the watched rows, token by token
# Whether the student is coming nearer to its teacher, whatever the objective looks at; means in a step record.
OUTSIDE = ("reverse_kl", "student_entropy", "teacher_entropy", "support_mass", "support_mass_teacher", "acceptance")
SUMMED = (*PER_TOKEN, *OUTSIDE, "teacher_logp", "gap", "gap_squared")


@dataclass(frozen=True)
class GateStats:
    """What one call of the loss saw, detached: N packed tokens (fp32; fp64 for fp64 inputs) and B responses.

    With a context shard these are the tokens of all its group's ranks, on each of them; only `policy` is a rank's own.
    """

    overlap_N: Tensor  # O, always fp32; measured with objective.k where there is no gate
    event_N: Tensor  # B, bool
    reliability_N: Tensor  # R
    weight_N: Tensor  # of the objective: W, times the weighting's; without the correction of `objective.mismatch`
    sampled_logp_N: Tensor  # student's log p(y_t); of the class where y_t is one of the ends that are one outcome
    token_logp_N: Tensor  # student's log p of the sampled id itself
    divergence_N: Tensor  # of the objective, before any weight: not the full KL, unless that is the objective [nats]
    reverse_kl_N: Tensor  # over the whole vocabulary; NaN where ranks have not the same ids of both models [nats]
    student_entropy_N: Tensor  # over the whole vocabulary [nats]
    teacher_entropy_N: Tensor
    student_mass_N: Tensor  # p of the student's top k ids, together
    teacher_mass_N: Tensor  # q of the same ids; NaN, like KL and entropy above, where only its best ids are known
    acceptance_N: Tensor  # Σ min(p, q) of the same ids; likewise
    teacher_logp_N: Tensor  # teacher's log q(y_t)
    reliable_length_B: Tensor  # E, int64
    length_B: Tensor  # int64
    ratio_N: Tensor | None = None  # p / p_old, mean of a token's candidates; None without an old policy or rewards
    clipped_N: Tensor | None = None  # share of a token's candidates that the clip has taken the gradient from
    policy: OldPolicy | None = None  # if it was to be kept
    stale_ratio_N: Tensor | None = None  # p / p_sampled of stale tokens, NaN at the others; None where all are fresh
    stale_clipped_N: Tensor | None = None  # bool: whether the clip has changed that ratio
    ends_5M: Tensor | None = None  # `AtEnds.sums` over the tokens; None without terminal ids


class TokenRecord:
    """The statistics of one call, noted down chunk by chunk. keep: the policy too, for later updates."""

    def __init__(self, tokens: Tokens, dtype: torch.dtype, keep: bool) -> None:
        self._tokens, self._dtype, self._keep = tokens, dtype, keep
        self._values: list[list[Tensor]] = []
        self._losses: list[Tensor] = []
        self._sums: list[VocabSums] = []
        self._outcomes: list[Tensor] = []
        self._policies: list[OldPolicy] = []
        self._ends_5M: Tensor | None = None

    def add(
        self,
        scores: Scores,
        weights: list[Tensor],
        loss: ChunkLoss,
        plain_N: Tensor,
        advantage_N: Tensor | None = None,
    ) -> None:
        """Take in the next chunk, with the objectives' weights; plain_N: the first's, before `objective.mismatch`.

        advantage_N: of a task's reward, corrected.
        What can be made of what is noted is made in the end, of all chunks at once.
        """
        moved = [] if loss.ratio_N is None or loss.clipped_N is None else [loss.ratio_N, loss.clipped_N]
        seen = scores.agreement
        own = [] if scores.ends is None else [scores.token_logp_N]
        values = [seen.overlap, seen.event, plain_N, loss.divergence_N, seen.student_mass, seen.teacher_mass]
        self._values.append([*values, seen.acceptance, *own, *moved])
        self._losses.append(loss.loss_N)
        self._sums.append(scores.sums._replace(rest_2N1=None))
        # A copy: a view would hold the log-probabilities of all candidates.
        self._outcomes.append(scores.outcome_logp_2N.clone())
        if scores.ends is not None:
            ends_5M = scores.ends.sums()
            self._ends_5M = ends_5M if self._ends_5M is None else self._ends_5M + ends_5M
        if self._keep:
            at = scores.at[0]
            chosen = Candidates(at.ids_NK, at.valid_NK)
            reward_NK = None if loss.first is None else loss.first.reward_NK
            sampled_N = None if advantage_N is None else scores.sampled_logp_N.clone()
            self._policies.append(OldPolicy(weights, chosen, at.student_logp_NK, reward_NK, sampled_N, advantage_N))

    def loss_sum(self) -> Tensor:
        """Of all chunks, added up in fp64."""
        return torch.cat(self._losses).double().sum().to(self._dtype)

    def stats(self, offsets: Sequence[int], method: Method, whole_teacher: bool = True) -> GateStats:
        """Of all chunks, and of all ranks that share the tokens. ValueError for broken numbers, on all these ranks.

        whole_teacher: whether the teacher's log-probability is known at every id.
        """
        sampled_ids_N, _, vocab_size, context, stale_logp_N, *_ = self._tokens
        values_N = [torch.cat(chunks) for chunks in zip(*self._values, strict=True)]
        sums, (sampled_logp_N, teacher_logp_N) = VocabSums.concatenate(self._sums), torch.cat(self._outcomes, dim=1)
        own, moved = (values_N[7:8], values_N[8:]) if method.terminal_ids else ([sampled_logp_N], values_N[7:])
        of_both = [*sums.entropies(), sums.reverse_kl()]
        if not whole_teacher:
            unknown_N = torch.full_like(sampled_logp_N, math.nan)
            values_N[5:7], of_both[1:] = [unknown_N] * 2, [unknown_N] * 2
        values_N = [*values_N[:7], sampled_logp_N, teacher_logp_N, *of_both, *own, *moved]
        stale = [] if stale_logp_N is None else [(own[0] - stale_logp_N).exp()]
        outside = ((sampled_ids_N < 0) | (sampled_ids_N >= vocab_size)).any()
        finite_2 = sums.total_2N1.log().isfinite().all(dim=1).squeeze(1)
        broken_3 = torch.cat([~finite_2, outside[None]]).int()
        if context is not None:
            dist.all_reduce(broken_3, op=dist.ReduceOp.MAX, group=context.group)
            if self._ends_5M is not None:
                dist.all_reduce(self._ends_5M, group=context.group)
            whole = context.whole([*values_N, *stale], self._dtype)
            values_N, stale = whole[: len(values_N)], whole[len(values_N) :]
        raise_if_broken(broken_3, vocab_size)
        overlap_N, event_N, weight_N, divergence_N, student_mass_N, teacher_mass_N, acceptance_N, *more = values_N
        sampled_logp_N, teacher_logp_N, student_entropy_N, teacher_entropy_N, reverse_kl_N, token_logp_N, *moved = more
        ratio_N, clipped_N = moved or (None, None)
        reliability_N, _, reliable_length_B = apply_gate_packed(event_N, offsets, method.gate, self._dtype)
        return GateStats(
            overlap_N=overlap_N,
            event_N=event_N,
            reliability_N=reliability_N,
            weight_N=weight_N,
            sampled_logp_N=sampled_logp_N,
            divergence_N=divergence_N,
            reverse_kl_N=reverse_kl_N,
            student_entropy_N=student_entropy_N,
            teacher_entropy_N=teacher_entropy_N,
            student_mass_N=student_mass_N,
            teacher_mass_N=teacher_mass_N,
            acceptance_N=acceptance_N,
            teacher_logp_N=teacher_logp_N,
            reliable_length_B=reliable_length_B,
            length_B=torch.tensor(offsets, device=event_N.device).diff(),
            ratio_N=ratio_N,
            clipped_N=clipped_N,
            policy=OldPolicy.concatenate(self._policies) if self._keep else None,
            stale_ratio_N=stale[0] if stale else None,
            stale_clipped_N=(stale[0] - 1).abs() > method.objective.clip if stale else None,
            token_logp_N=token_logp_N,
            ends_5M=self._ends_5M,
        )


class BatchStats:
    """Sums over response tokens, also by position in the response (`bins` of equal width over `max_len` tokens).

    watched: rows of the global batch whose single tokens are kept too, for whoever wants to look at them.
    early: (first tokens of a response that the gate's calibration is made of, ids in a top-k set there).
    mismatch: that of the batch, which is added up and reduced with the rest.
    terminal_ids: what ends a response for either model; the calls of the loss have had the same.
    """

    def __init__(
        self,
        responses: int,
        bins: int,
        max_len: int,
        device: torch.device,
        watched: Sequence[int] = (),
        early: tuple[int, int] = (0, 1),
        mismatch: Mismatch | None = None,
        terminal_ids: Sequence[int] = (),
    ):
        self.bins, self.max_len, self.watched = bins, max_len, tuple(watched)
        self.mismatch = mismatch
        self.early_tokens, self.k = early
        # Of these tokens: how many, Σ acceptance, Σ acceptance², and how many share 0, 1, … k ids.
        self.early = torch.zeros(3 + self.k + 1, dtype=torch.float64, device=device)
        self.early_kl = torch.zeros(1, dtype=torch.float64, device=device)  # Σ reverse KL of them, 0 where unknown
        shape = (len(self.watched), len(PER_TOKEN), max_len)
        self.tokens_W4T = torch.zeros(shape, dtype=torch.float64, device=device)  # PER_TOKEN of the watched rows
        self.reliable_length_B = torch.zeros(responses, dtype=torch.float64, device=device)
        self.sums = torch.zeros(len(SUMMED), bins, dtype=torch.float64, device=device)
        self.count = torch.zeros(bins, dtype=torch.float64, device=device)
        self.ratio_3 = torch.zeros(3, dtype=torch.float64, device=device)  # sums of ratio and clipped, tokens
        self.stale_3 = torch.zeros(3, dtype=torch.float64, device=device)  # the same of an older student's tokens
        self.terminal_ids = tuple(terminal_ids)
        self.ends_5M = torch.zeros(5, len(self.terminal_ids), dtype=torch.float64, device=device)  # `AtEnds.sums`
        self.parts: dict[str, BatchStats] = {}  # of each of several teachers; they are reduced with these

    def add(self, rows: Sequence[int], stats: GateStats) -> None:
        """Take in one micro-batch: `rows` of the global batch, in the order in which they are packed."""
        self.reliable_length_B[list(rows)] = stats.reliable_length_B.double()
        length_B = stats.length_B
        start_B = length_B.cumsum(0) - length_B
        position_N = torch.arange(len(stats.overlap_N), device=length_B.device) - start_B.repeat_interleave(
            length_B,
            output_size=len(stats.overlap_N),  # or the host would wait for the sum of the lengths
        )
        bin_N = (position_N * self.bins // self.max_len).clamp_max(self.bins - 1)
        values = [stats.overlap_N, stats.event_N, stats.weight_N, stats.divergence_N, stats.reverse_kl_N]
        values += [stats.student_entropy_N, stats.teacher_entropy_N, stats.student_mass_N, stats.teacher_mass_N]
        gap_N = stats.sampled_logp_N.double() - stats.teacher_logp_N.double()
        values += [stats.acceptance_N, stats.teacher_logp_N, gap_N, gap_N**2]
        value_SN = torch.stack([value_N.double() for value_N in values])
        self.sums.index_add_(1, bin_N, value_SN)
        value_4N = value_SN[: len(PER_TOKEN)]
        early_N, acceptance_N = (position_N < self.early_tokens).double(), stats.acceptance_N.double().nan_to_num(nan=0)
        self.early[:3] += torch.stack([early_N, early_N * acceptance_N, early_N * acceptance_N**2]).sum(1)
        self.early[3:].index_add_(0, (stats.overlap_N * self.k).round().long(), early_N)
        self.early_kl += (early_N * stats.reverse_kl_N.double().nan_to_num(nan=0.0)).sum()
        if self.mismatch is not None:
            self.mismatch.add(rows, length_B, stats.token_logp_N)
        self.count.index_add_(0, bin_N, torch.ones_like(bin_N, dtype=torch.float64))
        if stats.stale_ratio_N is not None and stats.stale_clipped_N is not None:
            stale_N = ~stats.stale_ratio_N.isnan()
            sums = (stats.stale_ratio_N.where(stale_N, 0), stats.stale_clipped_N.where(stale_N, 0), stale_N)
            self.stale_3 += torch.stack([part.double().sum() for part in sums])
        if stats.ends_5M is not None:
            self.ends_5M += stats.ends_5M
        for i, row in enumerate(self.watched):
            if row in rows:
                place = list(rows).index(row)
                first, length = int(start_B[place]), min(int(length_B[place]), self.max_len)
                self.tokens_W4T[i, :, :length] = value_4N[:, first : first + length]

    def miss(self, rows: Sequence[int]) -> None:
        """Note that a micro-batch could not be judged: its responses have no reliable length, its tokens no part."""
        self.reliable_length_B[list(rows)] = math.nan

    def add_ratio(self, stats: GateStats) -> None:
        """Take in one micro-batch of an update: how far the student has moved from the policy that sampled it."""
        if stats.ratio_N is not None and stats.clipped_N is not None:
            counted = torch.ones_like(stats.ratio_N)
            self.ratio_3 += torch.stack([stats.ratio_N, stats.clipped_N, counted]).double().sum(1)

    def reduce(self, counts: bool) -> None:
        """Make every rank's sums those of the global batch, on the host: one collective of the whole job, one wait.

        counts: whether this rank's sums are taken; each token must be in those of one rank (`Layout.reports`).
        """
        names: tuple[str, ...] = ("reliable_length_B", "sums", "count", "ratio_3", "stale_3", "early", "early_kl")
        names += ("tokens_W4T", "ends_5M")
        owners: list[tuple[Any, str]] = [(self, name) for name in names]
        owners += [] if self.mismatch is None else [(self.mismatch, "sums_B6")]
        parts = [getattr(owner, name) for owner, name in owners]
        flat = torch.cat([part.flatten() for part in parts])
        if not counts:
            flat.zero_()
        dist.all_reduce(flat)
        whole = flat.cpu().split([part.numel() for part in parts])
        for (owner, name), part, values in zip(owners, parts, whole, strict=True):
            setattr(owner, name, values.view_as(part))
        for of_teacher in self.parts.values():
            of_teacher.reduce(counts)

    def near(self, end: int, tokens: int) -> dict[str, float] | None:
        """Signals over the bins that the `tokens` tokens before token number `end` lie in; None if there was none.

        overlap, the teacher's mass on the student's candidates, mean and root mean square of log p(y) − log q(y).
        """
        first, last = (min(t * self.bins // self.max_len, self.bins - 1) for t in (max(end - tokens, 0), end - 1))
        part = slice(first, max(first, last) + 1)
        count = float(self.count[part].sum())
        if count == 0:
            return None
        mean = dict(zip(SUMMED, (self.sums[:, part].sum(1) / count).tolist(), strict=True))
        signals = {name: mean[name] for name in ("overlap", "support_mass_teacher", "gap")}
        return {**signals, "gap_size": math.sqrt(mean["gap_squared"])}

    def record(self) -> dict[str, Any]:
        """The gate's part of a step record in metrics.jsonl."""
        tokens = self.count.sum().clamp_min(1)
        mean = dict(zip(SUMMED, (self.sums.sum(1) / tokens).tolist(), strict=True))
        variance = max(mean["gap_squared"] - mean["gap"] ** 2, 0)
        known = not math.isnan(mean["reverse_kl"])
        outside = {name: None if math.isnan(mean[name]) else mean[name] for name in (*OUTSIDE, "teacher_logp")}
        ratio, clipped, updated = self.ratio_3.tolist()
        moved = {"ratio_mean": ratio / updated, "clip_fraction": clipped / updated} if updated else {}
        ratio, clipped, stale = self.stale_3.tolist()
        corrected = {"stale_ratio_mean": ratio / stale, "stale_clip_fraction": clipped / stale} if stale else {}
        return {
            "overlap": mean["overlap"],
            "event_rate": mean["event"],
            "weight_mean": mean["weight"],
            "divergence": mean["divergence"],
            **outside,
            "reverse_kl_sampled": mean["gap"],
            "reverse_kl_sampled_stderr": math.sqrt(variance / float(tokens)),
            "reliable_length": self.reliable_length_B.mean().item(),
            "overlap_by_position": self._curve(self.sums[PER_TOKEN.index("overlap")]),
            "weight_by_position": self._curve(self.sums[PER_TOKEN.index("weight")]),
            "reverse_kl_by_position": self._curve(self.sums[SUMMED.index("reverse_kl" if known else "gap")]),
            **moved,
            **corrected,
            **(self.mismatch.record() if self.mismatch else {}),
            **(end_record(self.ends_5M, self.terminal_ids, float(tokens)) if self.terminal_ids else {}),
        }

    def lengths(self, length_B: Sequence[int]) -> list[int]:
        """How many responses end in each bin, the place of their last tokens; empty ones are in the first."""
        count = [0] * self.bins
        for length in length_B:
            count[min(max(length - 1, 0) * self.bins // self.max_len, self.bins - 1)] += 1
        return count

    def _curve(self, sums: Tensor) -> list[float | None]:
        pairs = zip(sums.tolist(), self.count.tolist(), strict=True)
        return [total / count if count else None for total, count in pairs]
