"""The trainer's own log-probabilities of sampled tokens, by the code that computes the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.config import ObjectiveConfig
from prune_opd.loss import Head, Method, Tokens, distill_loss
from prune_opd.megatron.layout import Layout
from prune_opd.megatron.model import HiddenStatesGPT
from prune_opd.megatron.packing import PackedBatch, pack, pack_rows
from prune_opd.megatron.schedule import forward
from prune_opd.rollout.batch import Rollouts


@torch.no_grad()
def sampled_logprobs(
    chunks: Sequence[HiddenStatesGPT],
    rollouts: Rollouts,
    layout: Layout,
    device: torch.device,
) -> list[float]:
    """log p(y_t) of every response token, rows in order. Collective over the whole job.

    The loss of a model with itself as teacher: its statistics hold what is asked for.
    """
    prompts, responses, student = rollouts.prompt_ids, rollouts.response_ids, layout.student
    shape = (device, chunks[0].token_multiple, student.cp_group)
    batches = pack(prompts, responses, range(len(responses)), 16384, *shape)
    missing = -len(batches) % student.microbatch_multiple
    batches += [pack_rows(prompts, responses, [], *shape)] * missing

    def logprobs(batch: PackedBatch, hidden_NH: Tensor) -> Tensor:
        head = Head(hidden_NH[batch.predicting_M], chunks[-1].head_weight())
        tokens = Tokens(batch.sampled_ids_M, batch.cu_responses, chunks[-1].spec.vocab_size, batch.context)
        method = Method(gate=None, objective=ObjectiveConfig(k=1))
        _, _, stats = distill_loss(head, head, tokens, method, tp_group=student.tp_group)
        return stats.sampled_logp_N

    on_last_stage = forward(chunks, student, batches, logprobs)
    tokens = sum(rollouts.length_B)
    logprob_N = torch.cat(on_last_stage).float() if on_last_stage else torch.empty(tokens, device=device)
    last = dist.get_process_group_ranks(student.groups.pp)[-1]
    dist.broadcast(logprob_N, src=last, group=student.groups.pp)
    return logprob_N.tolist()
