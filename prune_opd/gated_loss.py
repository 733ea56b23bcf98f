"""Where the loss meets a run: the function that the trainer calls with the student's hidden states of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from prune_opd.fused_loss import OldPolicy, distill_loss
from prune_opd.setup import Run
from prune_opd.stats import BatchStats

if TYPE_CHECKING:
    from prune_opd.megatron.model import HiddenStatesGPT
    from prune_opd.megatron.packing import PackedBatch
    from prune_opd.megatron.trainer import LossFunction


def gated_loss(
    run: Run, batches: Sequence[PackedBatch], teacher_hidden: Sequence[Tensor], stats: BatchStats, updates: int = 1
) -> LossFunction:
    """The trainer's loss function for this step: `distill_loss` on the positions that predict a response token.

    What the gate saw goes to `stats`. With several updates a batch (method.md §1), the first call with a micro-batch
    notes down what is then fixed of it (`OldPolicy`: gate weights, and a policy gradient's candidates and rewards) and
    counts it in the statistics; later calls hold the student as it has become against that.
    """
    rows = [batch.rows for batch in batches] if run.layout.student.is_last_stage else []
    hidden_of = dict(zip(rows, teacher_hidden, strict=True))
    policies: dict[tuple[int, ...], OldPolicy] = {}

    def loss(model: HiddenStatesGPT, batch: PackedBatch, hidden_NH: Tensor) -> tuple[Tensor, int]:
        old = policies.get(batch.rows)
        loss_sum, tokens, seen = distill_loss(
            hidden_NH[batch.predicting_M],
            model.head_weight(),
            hidden_of[batch.rows],
            run.teacher.head_weight,
            batch.sampled_ids_M,
            batch.cu_responses,
            run.config.gate,
            run.config.objective,
            run.layout.tp_group,
            vocab_size=run.vocab_size,
            weighting=run.config.weighting,
            keep_policy=updates > 1 and old is None,
            old=old,
        )
        if old is None:
            stats.add(batch.rows, seen)
        else:
            stats.add_ratio(seen)
        if seen.policy is not None:
            policies[batch.rows] = seen.policy
        return loss_sum, tokens

    return loss
