"""Where the loss meets a run: the function that the trainer calls with the student's hidden states of a micro-batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prune_opd.errors import NotFiniteLogitsError
from prune_opd.loss import Head, Method, OldPolicy, Tokens, distill_loss
from prune_opd.loss.stats import BatchStats
from prune_opd.run import Run

if TYPE_CHECKING:
    from prune_opd.megatron.model import HiddenStatesGPT
    from prune_opd.megatron.packing import PackedBatch
    from prune_opd.megatron.redistribute import TeacherHidden
    from prune_opd.megatron.trainer import LossFunction


def gated_loss(run: Run, teacher_hidden: TeacherHidden, stats: BatchStats, updates: int = 1) -> LossFunction:
    """The trainer's loss function for this step: `distill_loss` on the positions that predict a response token.

    What the gate saw goes to `stats`. With several updates a batch (method.md §1), the first call with a micro-batch
    notes down what is then fixed of it (`OldPolicy`: gate weights, and a policy gradient's candidates and rewards) and
    counts it in the statistics; later calls hold the student as it has become against that.

    Logits that are not finite make the loss NaN, and the trainer then leaves the update out on every rank. An error
    would end the ranks of this micro-batch while the others wait for their gradients.
    """
    policies: dict[tuple[int, ...], OldPolicy] = {}

    def loss(model: HiddenStatesGPT, batch: PackedBatch, hidden_NH: Tensor) -> tuple[Tensor, int]:
        old = policies.get(batch.rows)
        head_weight_VH, context = model.head_weight(), batch.context
        teacher_hidden_MH = teacher_hidden.packed(batch.rows)
        try:
            loss_sum, tokens, seen = distill_loss(
                Head(hidden_NH[batch.predicting_M], head_weight_VH),
                Head(
                    teacher_hidden_MH if context is None else teacher_hidden_MH[context.index_N],
                    run.teacher.head_weight,
                ),
                Tokens(batch.sampled_ids_M, batch.cu_responses, run.vocab_size, context, batch.stale_logp_M),
                Method(run.config.gate, run.config.objective, run.config.weighting),
                tp_group=run.layout.tp_group,
                chunk=run.config.parallel.loss_chunk_tokens,
                policy="keep" if old is None and updates > 1 else old,
                # The head's gradient goes straight into megatron's buffer: the trainer back-propagates loss_sum as it
                # is and divides by the global token count at the end. A tied embedding's own gradient arrives through
                # param.grad, which megatron's hook adds to the same buffer. overlap_grad_reduce would need a param.grad
                # of an untied head too: megatron's hook asserts that there is one (read in its source, not run).
                weight_grad=getattr(head_weight_VH, "main_grad", None),
            )
        except NotFiniteLogitsError:  # on all ranks that share these tokens
            if old is None:
                stats.miss(batch.rows)
            return hidden_NH.sum(dtype=torch.float32) * math.nan, len(batch.sampled_ids_M)
        if old is None:
            stats.add(batch.rows, seen)
        else:
            stats.add_ratio(seen)
        if seen.policy is not None:
            policies[batch.rows] = seen.policy
        return loss_sum, tokens

    return loss
