"""How far the rollout engine is from the trainer, and what a token counts where they differ.

The same weights give two probabilities of a sampled token y: p in the trainer, and p_engine in the engine that sampled
it, whose kernels and formats are others. With the ratio ρ = p(y) / p_engine(y) and Δ = log ρ:

    |Δ|                                  nats
    k3 = ρ − 1 − Δ                       never negative; its mean estimates KL(p_engine ‖ p), low in variance
    truncated   w = min(ρ, C)            TIS, C = 2 ("Your Efficient RL Framework Secretly Brings You Off-Policy RL
                                         Training", Yao et al. 2025)
    masked      w = ρ if α ≤ ρ ≤ β, 0    IcePop, α = 0.5, β = 5 (Ling team, Ring-1T, arXiv 2510.18855); MIS is the same
                                         without α

w is a constant and multiplies a token's loss beside the gate's W; the count that the loss is divided by stays that of
all tokens. Where the loss of a token is an estimate from the token itself (sampled_token), w makes its mean that of the
trainer's policy, but for what is cut. An objective over candidates has the right mean without it: there w damps, or
leaves out, the places where both engines do not agree, which is how other systems use it too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prune_opd.config import ObjectiveConfig


def log_ratio(logp_N: Tensor, engine_logp_N: Tensor) -> Tensor:
    """Δ = log p − log p_engine of sampled tokens [nats], float64; NaN where the engine's is not known."""
    return logp_N.double() - engine_logp_N.double()


def engine_correction(objective: ObjectiveConfig, logp_N: Tensor, engine_logp_N: Tensor) -> Tensor:
    """w [N] of `objective.mismatch`, float64: at least 0; 1 at tokens whose `engine_logp_N` is NaN, and for `none`."""
    low, high = objective.mismatch_bounds
    ratio_N = log_ratio(logp_N, engine_logp_N).clamp(-20, 20).exp()
    if objective.mismatch == "none":
        return torch.ones_like(ratio_N)
    if objective.mismatch == "masked":
        ratio_N = ratio_N.masked_fill((ratio_N < low) | (ratio_N > high), 0)
    return ratio_N.clamp(max=high).nan_to_num(nan=1.0)
