"""Token weightings from the literature, beside the gate, for the baselines that Prune-OPD is compared with.

    iw_opd          w_t = 1 + γ (1 − Σ_{i<t} |A_i| / Σ_i |A_i|)                  falls along the response, 1 + γ → 1
    tip             w_t = T / |S| for t in S, the most important share of the response, and 0 elsewhere
    entropy_aware   adds 1[H(q_t) > τ] · Σ_j q̄_j (log q̄_j − log p_j) on the teacher's top-k to the objective
    sdar            w_t = σ(β A_t)                            a gate of the token alone, which recovers at once
    tropd           w_t = min(q(y_t) / p(y_t), 1)             and adds (1 − w_t) times that forward KL: the same

All are stop-gradient and multiply the gate's W. What each formula rests on:

- IW-OPD, "On the Position Bias of On-Policy Distillation", arXiv 2606.22600 (γ = 0.5). The paper itself was not read;
  the formula is the one of the authors' code (github.com/YannX1e/Importance-Weighted-On-Policy-Distillation,
  dp_actor.py, `iw_opd_weight_max` = 1 + γ) and of TRL's `iw_opd_trainer.py`, and a reader's notes quote it so from the
  paper. A_t = log q(y_t) − log p(y_t), before the first update. Ours: of the sampled token whatever the objective is.
- TIP, "Token Importance in On-Policy Distillation", arXiv 2604.14084, from the paper (v4): eqs. 2 and 3 (student
  entropy, reverse KL over the vocabulary), 7 (Soft-OR score ĥ + δ̂ − ĥ δ̂ of both, min-max normalised), section 6 (the
  top 2 % of the entropies are clipped first) and eqs. 8 and 9 (the ⌊ρ T⌋ best tokens of a rollout, the mean loss over
  them; ρ = 0.5 is the main setting). Ours: entropy cut and normalisation are within a response where the paper takes
  the batch, so that micro-batches, packing and data parallelism change nothing; at least one token is kept, where
  ⌊ρ T⌋ = 0 leaves no mean; the selected weigh T / |S|, so the response keeps its weight in the global token mean.
- EOPD, "Entropy-Aware On-Policy Distillation of Language Models", arXiv 2603.07079, eqs. 9 and 10 (τ = 0.8 nats,
  k = 16): above that teacher entropy, over the whole vocabulary, the forward KL is added to the reverse KL, in one mean
  over all valid tokens, with q renormalised on its top-k and p not. The paper itself was not read, only how others
  quote it: implementations that cite these equations, and the abstract of arXiv 2609.39275 ("EOPD renormalizes these
  probabilities"). The authors' code (github.com/WLS04/EOPD, read in the fork ckjsuperhh/CacheEOPD) does not
  renormalise q and takes entropies ≥ τ; we follow the equations. Ours: any objective may be the base (the published
  one is `sampled_token`), and the gate weighs both parts.
- SDAR, "Self-Distilled Agentic Reinforcement Learning", arXiv 2605.15155 (abstract and reviews were read): a sigmoid of
  the detached gap log q(y_t) − log p(y_t) strengthens tokens that the teacher endorses and attenuates those that it
  rejects. There it is an auxiliary of reinforcement learning; ours: as the weight of plain distillation, and β = 1.
- TrOPD, "Trust Region On-Policy Distillation", arXiv 2606.01249 (read in a reader's notes, which quote its objective):
  a token is trusted with probability min(q / p, 1), drawn anew, as speculative decoding accepts it; trusted tokens have
  the sampled reverse KL, the others a forward KL on the teacher's top-k. Ours: the mean of that draw, which has the
  same mean gradient and no noise; any objective may be the base; q is renormalised on its top-k as elsewhere here; the
  third term, on prefixes that the teacher writes, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from prune_opd.config import ObjectiveConfig, WeightingConfig

ENTROPY_CUT = 0.98  # quantile of tip's student entropy above which all entropies count the same


def stale_correction(logp_N: Tensor, sampled_logp_N: Tensor, clip: float) -> Tensor:
    """p / p_sampled of stale tokens, clipped to 1 ± clip; 1 at the others, whose `sampled_logp_N` is NaN."""
    ratio_N = (logp_N - sampled_logp_N).clamp(-20, 20).exp()
    return ratio_N.clamp(1 - clip, 1 + clip).nan_to_num(nan=1.0)


class Signals(NamedTuple):
    """What the weightings are made of, per token [nats]."""

    advantage_N: Tensor  # log q(y_t) − log p(y_t)
    student_entropy_N: Tensor
    teacher_entropy_N: Tensor
    reverse_kl_N: Tensor  # over the vocabulary; NaN where it is not known, which is not where `needs_reverse_kl`

    def part(self, part: slice) -> Signals:
        """Slice of these tokens, in float64."""
        return Signals(*(signal_N[part].double() for signal_N in self))

    @staticmethod
    def concatenate(chunks: Sequence[Signals]) -> Signals:
        """Concatenate the chunks' signals."""
        return Signals(*(torch.cat(signal) for signal in zip(*chunks, strict=True)))


def needs_reverse_kl(config: WeightingConfig) -> bool:
    """Whether the weighting needs the reverse KL over the vocabulary, for which ranks need the same ids of both."""
    return config.name == "tip"


def needs_whole_response(config: WeightingConfig) -> bool:
    """Whether a token's weight depends on later tokens: such a weighting takes a pass of its own."""
    return config.name in _OF_RESPONSE


def added_objective(config: WeightingConfig) -> ObjectiveConfig | None:
    """The objective that is added to the configured one, on the tokens that `added_on` says."""
    if config.name not in ("entropy_aware", "tropd"):
        return None
    return ObjectiveConfig(name="topk_forward_kl", k=config.forward_k)


def added_on(config: WeightingConfig, signals: Signals) -> Tensor:
    """What the added objective counts at each token [N]. EOPD: where the teacher is uncertain; TrOPD: untrusted."""
    if config.name == "tropd":
        return 1 - token_factor(config, signals)
    return signals.teacher_entropy_N > config.entropy_threshold


def looks_at_tokens(config: WeightingConfig) -> bool:
    """Whether a token's weight depends on that token alone (`token_factor`)."""
    return config.name in _OF_TOKEN


def token_factor(config: WeightingConfig, signals: Signals) -> Tensor:
    """w_t [N] of a weighting that looks at each token alone; 1 for others."""
    if not looks_at_tokens(config):
        return torch.ones_like(signals.advantage_N)
    return _OF_TOKEN[config.name](config, signals.advantage_N)


def response_weights(config: WeightingConfig, signals: Signals, cu_seqlens: Sequence[int]) -> Tensor:
    """w_t [N] of packed responses, in float64, for a weighting that needs whole responses."""
    weight_N = torch.ones_like(signals.advantage_N, dtype=torch.float64)
    for begin, end in pairwise(cu_seqlens):
        if end > begin:
            weight_N[begin:end] = _OF_RESPONSE[config.name](config, signals.part(slice(begin, end)))
    return weight_N


def _iw_opd(config: WeightingConfig, signals: Signals) -> Tensor:
    size_T = signals.advantage_N.abs()
    before_T = size_T.cumsum(0) - size_T
    # No advantage anywhere (the student is the teacher): the weight stays at its first value.
    return 1 + config.gamma * (1 - before_T / size_T.sum().clamp_min(1e-8))


def _tip(config: WeightingConfig, signals: Signals) -> Tensor:
    entropy_T = signals.student_entropy_N
    entropy_T = _min_max(entropy_T.clamp(max=entropy_T.quantile(ENTROPY_CUT)))
    divergence_T = _min_max(signals.reverse_kl_N)
    # The Soft-OR ĥ + δ̂ − ĥ δ̂ in the form that is exactly 1 where either is: the highest of both tie, the earlier wins.
    score_T = 1 - (1 - entropy_T) * (1 - divergence_T)
    kept = max(math.floor(config.retain * len(score_T) + 1e-9), 1)  # 0.29 · 100 is a little less than 29
    weight_T = torch.zeros_like(score_T)
    weight_T[score_T.sort(descending=True, stable=True).indices[:kept]] = len(score_T) / kept
    return weight_T


def _min_max(value_T: Tensor) -> Tensor:
    low, high = value_T.min(), value_T.max()
    return (value_T - low) / (high - low) if high > low else torch.zeros_like(value_T)


_OF_RESPONSE: dict[str, Callable[[WeightingConfig, Signals], Tensor]] = {"iw_opd": _iw_opd, "tip": _tip}
_OF_TOKEN: dict[str, Callable[[WeightingConfig, Tensor], Tensor]] = {
    "sdar": lambda config, advantage_N: (config.sharpness * advantage_N).sigmoid(),
    "tropd": lambda config, advantage_N: advantage_N.clamp(max=0).exp(),
}
