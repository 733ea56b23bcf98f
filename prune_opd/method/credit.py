"""Credit for later tokens: what a token is rewarded with, when what follows from it counts too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def discounted_credit(reward_N: Tensor, cu_seqlens: Sequence[int], discount: float) -> Tensor:
    """A_t = Σ_{s ≥ t} γ^(s − t) r_s within each response, in float64 [N].

    Of MiniLLM, tinker's `kl_discount_factor` and γOPD (arXiv 2609.16937, read of only).

    reward_N: of packed tokens. cu_seqlens: the responses' offsets, from 0 to N. discount: γ, 0..1.

    Sums of 1, 2, 4 … tokens, each from two of the one before: as many steps as the longest response has binary digits.
    """
    length_B = torch.tensor(cu_seqlens, dtype=torch.int64).diff()
    response_N = torch.repeat_interleave(torch.arange(len(length_B)), length_B).to(reward_N.device)
    credit_N, span = reward_N.double(), 1
    longest = int(length_B.max()) if len(length_B) else 0
    while span < longest:
        follows = response_N[span:] == response_N[:-span]
        later_N = discount**span * credit_N[span:] * follows
        credit_N = torch.cat([credit_N[:-span] + later_N, credit_N[-span:]])
        span *= 2
    return credit_N
