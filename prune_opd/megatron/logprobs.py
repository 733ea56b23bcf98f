"""The trainer's own log-probabilities of sampled tokens, by the code that computes the loss."""

from __future__ import annotations

import torch

from prune_opd.config import ObjectiveConfig
from prune_opd.fused_loss import distill_loss
from prune_opd.megatron.layout import Layout
from prune_opd.megatron.model import HiddenStatesGPT
from prune_opd.megatron.packing import pack
from prune_opd.rollout.batch import Rollouts


@torch.no_grad()
def sampled_logprobs(
    model: HiddenStatesGPT, rollouts: Rollouts, layout: Layout, device: torch.device, temperature: float = 1.0
) -> list[float]:
    """log p(y_t) of every response token, rows in order. Collective over the TP group.

    The loss of a model with itself as teacher: its statistics hold what is asked for.
    """
    batches = pack(rollouts.prompt_ids, rollouts.response_ids, range(len(rollouts.responses)), 16384, device)
    logprobs: list[float] = []
    for batch in batches:
        hidden_MH = model(batch)[batch.predicting_M]
        _, _, stats = distill_loss(
            hidden_MH,
            model.head_weight(),
            hidden_MH,
            model.head_weight(),
            batch.sampled_ids_M,
            batch.cu_responses,
            None,
            ObjectiveConfig(k=1, temperature=temperature),
            layout.tp_group,
            vocab_size=model.spec.vocab_size,
        )
        logprobs += stats.sampled_logp_N.tolist()
    return logprobs
