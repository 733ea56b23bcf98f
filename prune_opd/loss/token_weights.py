"""Events and the weight of every token in the loss: gate × weighting × correction of stale tokens, all constants."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from prune_opd.loss.chunk import Scores
from prune_opd.loss.inputs import Method, Tokens
from prune_opd.method.agreement import Watch, along_responses, needs_kl
from prune_opd.method.credit import discounted_credit
from prune_opd.method.gate import PackedGate, apply_gate_packed
from prune_opd.method.mismatch import engine_correction
from prune_opd.method.objective import has_baseline, has_credit
from prune_opd.method.weighting import (
    Signals,
    added_on,
    looks_at_tokens,
    needs_whole_response,
    response_weights,
    stale_correction,
    token_factor,
)


class TokenWeights:
    """The objectives' weights, chunk by chunk in the order of the tokens: `judge` each chunk, then ask for its weights.

    The gate is a running count and needs no more than what came before. But its `mean` normalisation, the weightings
    iw_opd and tip, an objective with a discount, and a gate over responses that context-parallel ranks share need more
    of a response: where it `needs_ahead`, all chunks go through `look_ahead` first.

    offsets: the responses', on the host. dtype: of the weights.
    """

    def __init__(self, tokens: Tokens, offsets: Sequence[int], method: Method, dtype: torch.dtype) -> None:
        self._tokens, self._offsets, self._method, self._dtype = tokens, offsets, method, dtype
        gate = method.gate
        self._device = tokens.sampled_ids_N.device
        self._running, self._watch = PackedGate(offsets, gate, self._device, dtype), self._new_watch()
        self._gate_ahead = gate is not None and (gate.weight_normalisation == "mean" or tokens.context is not None)
        self._event_N: Tensor | None = None  # of this rank's tokens
        self._weighting_ahead = needs_whole_response(method.weighting)
        self._gate_N: Tensor | None = None  # W, of this rank's tokens
        self._weighting_N: Tensor | None = None
        self._credited = has_credit(method.objective)
        self._credit_N: Tensor | None = None  # of this rank's tokens

    def needs_ahead(self, weighted: bool) -> bool:
        """Whether the chunks must be looked at first. weighted: the weights are an older policy's and known."""
        if weighted:
            return self._watch is not None and self._tokens.context is not None
        return self._gate_ahead or self._weighting_ahead or self._credited

    def look_ahead(self, chunks: Iterable[Scores]) -> None:
        """Take in the events and signals of all chunks. Collective over the context-parallel group, if there is one."""
        seen, evidence, signals = zip(
            *((scores.agreement, self._evidence(scores), scores.signals) for scores in chunks), strict=True
        )
        given = list(Signals.concatenate(signals)) if self._weighting_ahead or self._credited else []
        judged = [torch.cat([of_chunk.event for of_chunk in seen]), torch.cat(evidence)]
        event_N, evidence_N, *given = self._whole([*judged, *given])
        if watch := self._new_watch():
            event_N = watch.advance(evidence_N)
            self._event_N = self._own(event_N)
        weight_N = apply_gate_packed(event_N, self._offsets, self._method.gate, self._dtype).weight_BT
        if self._gate_ahead:
            self._gate_N = self._own(weight_N)
        if self._weighting_ahead:
            factor_N = response_weights(self._method.weighting, Signals(*given), self._offsets).to(self._dtype)
            self._weighting_N, weight_N = self._own(factor_N), weight_N * factor_N
        if self._credited:
            signals_N = Signals(*given)
            weight_N = weight_N * token_factor(self._method.weighting, signals_N)
            reward_N = weight_N * signals_N.advantage_N
            credit_N = discounted_credit(reward_N, self._offsets, self._method.objective.discount)
            if has_baseline(self._method.objective):
                credit_N = credit_N + weight_N * signals_N.reverse_kl_N
            self._credit_N = self._own(credit_N.to(self._dtype))

    def judge(self, part: slice, scores: Scores) -> Scores:
        """The next chunk with the events of a gate that looks along responses."""
        if self._watch is None:
            return scores
        event_N = self._watch.advance(self._evidence(scores)) if self._event_N is None else self._event_N[part]
        return scores._replace(agreement=scores.agreement._replace(event=event_N))

    def next(self, part: slice, scores: Scores) -> list[Tensor]:
        """Weight of every token of the next chunk, [n] for each objective."""
        gate_N = self._running.weigh(scores.agreement.event) if self._gate_N is None else self._gate_N[part]
        weights = [gate_N if self._weighting_N is None else gate_N * self._weighting_N[part]]
        if looks_at_tokens(self._method.weighting):
            weights[0] = weights[0] * token_factor(self._method.weighting, scores.signals)
        weights += [gate_N * added_on(self._method.weighting, scores.signals) for _ in self._method.objectives[1:]]
        if (correction_N := self._stale_correction(part, scores)) is not None:
            weights = [weight_N * correction_N for weight_N in weights]
        return weights

    def credit(self, part: slice, scores: Scores) -> Tensor | None:
        """Rewards of these tokens with what later ones give to them; None where a token has its own alone.

        Every reward has the gate's and the weighting's weight of its own token in it, before it is handed on; the
        corrections of a token are of its log-probability, so its whole credit has them.
        """
        if self._credit_N is None:
            return None
        credit_N = self._credit_N[part]
        for correction_N in (self._stale_correction(part, scores), self._engine_correction(part, scores)):
            credit_N = credit_N if correction_N is None else credit_N * correction_N
        return credit_N if self._method.teacher_weight == 1 else credit_N * self._method.teacher_weight

    def corrected(self, part: slice, scores: Scores, weights: list[Tensor]) -> list[Tensor]:
        """The weights of a chunk times the correction of `objective.mismatch` and the teacher's weight.

        The gate never sees them.
        """
        if (correction_N := self._engine_correction(part, scores)) is not None:
            weights = [weight_N * correction_N for weight_N in weights]
        if (weight := self._method.teacher_weight) != 1:
            weights = [weight_N * weight for weight_N in weights]
        return weights

    def advantage(self, part: slice, scores: Scores) -> Tensor | None:
        """What a task's reward gives to the tokens of a chunk, times the corrections; None without one."""
        advantage_N = self._tokens.advantage_N
        if advantage_N is None:
            return None
        advantage_N = advantage_N[part].to(self._dtype)
        for correction_N in (self._stale_correction(part, scores), self._engine_correction(part, scores)):
            advantage_N = advantage_N if correction_N is None else advantage_N * correction_N
        return advantage_N

    def _stale_correction(self, part: slice, scores: Scores) -> Tensor | None:
        if self._tokens.stale_logp_N is None or not self._method.correct_stale:
            return None
        clip = self._method.objective.clip
        return stale_correction(scores.token_logp_N, self._tokens.stale_logp_N[part], clip).to(self._dtype)

    def _engine_correction(self, part: slice, scores: Scores) -> Tensor | None:
        engine_logp_N, objective = self._tokens.engine_logp_N, self._method.objective
        if objective.mismatch == "none" or engine_logp_N is None:
            return None
        return engine_correction(objective, scores.token_logp_N, engine_logp_N[part]).to(self._dtype)

    def _new_watch(self) -> Watch | None:
        return along_responses(self._offsets, self._method.gate, self._method.usual, self._device)

    def _evidence(self, scores: Scores) -> Tensor:
        """What a watch finds events by."""
        return scores.sums.reverse_kl() if needs_kl(self._method.gate) else scores.agreement.acceptance

    def _whole(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Values [N] of this rank's tokens as those of all tokens."""
        context = self._tokens.context
        return list(values) if context is None else context.whole(values, self._dtype)

    def _own(self, whole_N: Tensor) -> Tensor:
        """Slice of this rank's tokens."""
        context = self._tokens.context
        return whole_N if context is None else whole_N[context.index_N]
