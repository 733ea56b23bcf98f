"""A step's rollouts as the ranks train on them: dealt once, and this rank's part packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch

from prune_opd.megatron.layout import ModelLayout
from prune_opd.megatron.packing import PackedBatch, pack_rows
from prune_opd.rollout.balance import Deal, deal_groups, packing_record, padded_size
from prune_opd.rollout.batch import Rollouts
from prune_opd.rollout.reward import Rewards


@dataclass(frozen=True)
class TrainBatch:
    """The rollouts, and for each update of the step who trains on which of their rows.

    deals: which rows each data-parallel rank trains on, in which micro-batch; the same on every rank.
    minibatches: this data-parallel rank's part of each deal, as packed micro-batches.
    packing: what packing saved, of the global batch. rewards: a task's, if there is one.
    """

    rollouts: Rollouts
    deals: list[Deal]
    minibatches: list[list[PackedBatch]]
    packing: dict[str, float]
    rewards: Rewards | None = None

    def record(self) -> dict[str, Any]:
        """The batch's part of a step record."""
        return {**self.packing, **self.rollouts.record(), **(self.rewards.record() if self.rewards else {})}

    @property
    def advantage_B(self) -> Sequence[float] | None:
        """Of every response, where a task rewards them."""
        return self.rewards.advantage_B if self.rewards else None

    @property
    def microbatches(self) -> list[PackedBatch]:
        """Those of all updates, in order."""
        return list(chain.from_iterable(self.minibatches))


def make_batch(
    rollouts: Rollouts,
    updates: int,
    student: ModelLayout,
    token_budget: int,
    token_multiple: int,
    device: torch.device,
) -> TrainBatch:
    """Deal the rows: `updates` runs of whole responses, in their order, as equal as they can be.

    The runs are those of the global batch, so that the updates are the same at every data-parallel size.
    With several teachers a micro-batch has the rows of one.

    token_budget: tokens of a micro-batch on each rank that shares it. token_multiple: what they are filled up to.
    Raises `UserError` when an update has fewer rows than there are data-parallel ranks.
    """
    row_length_B = rollouts.row_length_B
    lengths = [padded_size(length, student.row_multiple) for length in row_length_B]
    bounds = pairwise(len(lengths) * i // updates for i in range(updates + 1))
    budget, multiple = token_budget * student.cp, student.microbatch_multiple
    deals = [
        deal_groups(lengths, _by_teacher(rollouts, range(first, last)), student.dp, budget, multiple)
        for first, last in bounds
    ]
    engine, stale = rollouts.fresh_logprobs_B, rollouts.stale_logprobs_B if any(rollouts.stale_logprobs_B) else None
    prompts, responses, shape = rollouts.prompt_ids, rollouts.response_ids, (device, token_multiple, student.cp_group)
    minibatches = [
        [pack_rows(prompts, responses, rows, *shape, stale, engine) for rows in dealt[student.dp_rank]]
        for dealt in deals
    ]
    packing = packing_record(row_length_B, deals, student.batch_multiple(token_multiple), student.row_multiple)
    if rollouts.prompts[0].teacher:
        every = [rows for dealt in deals for part in dealt for rows in part]
        packing |= {"microbatches": len(every), "microbatches_empty": sum(not rows for rows in every)}
    return TrainBatch(rollouts, deals, minibatches, packing)


def _by_teacher(rollouts: Rollouts, rows: range) -> list[list[int]]:
    """These rows, those of one teacher together; the teachers in the order in which they come first in the batch."""
    order = dict.fromkeys(prompt.teacher for prompt in rollouts.prompts)
    return [[row for row in rows if rollouts.prompts[row].teacher == teacher] for teacher in order]
