"""Where the loss meets a run: the function that the trainer calls with the student's hidden states of a micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.config import TrainConfig
from prune_opd.errors import NotFiniteLogitsError
from prune_opd.loss import Head, KnownTop, Method, OldPolicy, Tokens, distill_loss
from prune_opd.loss.context import ContextShard
from prune_opd.loss.stats import GateStats
from prune_opd.method.calibration import Usual, in_force


class Student(Protocol):
    """What the loss knows of the student (`HiddenStatesGPT`): the rows of its output matrix on this rank [V/tp, H]."""

    def head_weight(self) -> Tensor: ...


class Teacher(Protocol):
    """What it knows of the teacher (`megatron.teacher.Teacher`): what its numbers of some tokens say."""

    def view(self, hidden_MH: Tensor) -> Head | KnownTop: ...


class TeacherHidden(Protocol):
    """The teacher's hidden states of a step (`megatron.redistribute.TeacherHidden`)."""

    def packed(self, rows: Sequence[int]) -> Tensor: ...


class Teachers(Protocol):
    """What it knows of several (`megatron.teachers.Teachers`)."""

    @property
    def of(self) -> Mapping[str, Any]: ...


class MicroBatch(Protocol):
    """What it knows of a micro-batch (`PackedBatch`, which has the meanings)."""

    @property
    def rows(self) -> tuple[int, ...]: ...
    @property
    def predicting_M(self) -> Tensor: ...
    @property
    def sampled_ids_M(self) -> Tensor: ...
    @property
    def cu_responses(self) -> Tensor: ...
    @property
    def stale_logp_M(self) -> Tensor | None: ...
    @property
    def engine_logp_M(self) -> Tensor | None: ...
    @property
    def context(self) -> ContextShard | None: ...


class Sees(Protocol):
    """What takes in what the gate saw (`loss.stats.BatchStats`)."""

    terminal_ids: tuple[int, ...]

    def add(self, rows: Sequence[int], stats: GateStats) -> None: ...
    def miss(self, rows: Sequence[int]) -> None: ...
    def add_ratio(self, stats: GateStats) -> None: ...


class Taught(NamedTuple):
    """With several teachers: who teaches which row of the batch, and what is usual for each pair."""

    teacher_of_row: Sequence[str]
    usual: Mapping[str, Usual | None]


class ThisStep(NamedTuple):
    """What differs from step to step."""

    several: bool = False  # the batch serves several updates
    usual: Usual | None = None  # what is usual for the pair, of a gate that judges by it (`Calibration`)
    advantage_B: Sequence[float] | None = None  # of every response of the step, where a task rewards them
    taught: Taught | None = None  # with several teachers
    teacher_weight: float = 1.0  # of the one of them that a loss function is of


SAME = ThisStep()

LossFunction = Callable[[Student, MicroBatch, Tensor], tuple[Tensor, int]]  # (model, batch, hidden_NH) → sum, tokens


def gated_loss(
    config: TrainConfig,
    teacher: Teacher | Teachers,
    teacher_hidden: TeacherHidden | Teachers,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    stats: Sees,
    this: ThisStep = SAME,
) -> LossFunction:
    """The trainer's loss function for this step: `distill_loss` on the positions that predict a response token.

    vocab_size: ids that both models know. tp_group: the ranks that share the output matrices; None: there is one.

    What the gate saw goes to `stats`. With several updates a batch (method.md §1, `this.several`), the first call with
    a micro-batch notes down what is then fixed of it (`OldPolicy`: gate weights, and a policy gradient's candidates and
    rewards) and counts it in the statistics; later calls hold the student as it has become against that.

    With several teachers (`this.taught`) `teacher`, `teacher_hidden` and `stats` have one for each by name, as `of` and
    `parts`. A micro-batch has the rows of one, and goes by its head and its objective, times its weight:

        loss = Σ_teachers weight · Σ_t ℓ_t / number of tokens of all of them          still ONE token mean

    Logits that are not finite make the loss NaN, and the trainer then leaves the update out on every rank. An error
    would end the ranks of this micro-batch while the others wait for their gradients.
    """
    if this.taught is not None:
        return _by_teacher(config, teacher, teacher_hidden, vocab_size, tp_group, stats, this)
    teacher, teacher_hidden = cast(Teacher, teacher), cast(TeacherHidden, teacher_hidden)
    policies: dict[tuple[int, ...], OldPolicy] = {}
    gate = in_force(config.gate, this.usual)

    def loss(model: Student, batch: MicroBatch, hidden_NH: Tensor) -> tuple[Tensor, int]:
        old = policies.get(batch.rows)
        head_weight_VH, context = model.head_weight(), batch.context
        teacher_hidden_MH = teacher_hidden.packed(batch.rows)
        try:
            loss_sum, tokens, seen = distill_loss(
                Head(hidden_NH[batch.predicting_M], head_weight_VH),
                teacher.view(teacher_hidden_MH if context is None else teacher_hidden_MH[context.index_N]),
                Tokens(
                    batch.sampled_ids_M,
                    batch.cu_responses,
                    vocab_size,
                    context,
                    batch.stale_logp_M,
                    batch.engine_logp_M,
                    None if this.advantage_B is None else _of_tokens(this.advantage_B, batch),
                ),
                Method(
                    gate,
                    config.objective,
                    config.weighting,
                    this.usual,
                    stats.terminal_ids,
                    config.rollout.correct_stale,
                    this.teacher_weight,
                ),
                tp_group=tp_group,
                chunk=config.parallel.loss_chunk_tokens,
                policy="keep" if this.several and old is None else old,
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


class _Both:
    """Takes in what the gate saw twice: for the batch, and for one teacher's part of it."""

    def __init__(self, whole: Sees, part: Sees) -> None:
        self.each, self.terminal_ids = (whole, part), whole.terminal_ids

    def add(self, rows: Sequence[int], stats: GateStats) -> None:
        for one in self.each:
            one.add(rows, stats)

    def miss(self, rows: Sequence[int]) -> None:
        for one in self.each:
            one.miss(rows)

    def add_ratio(self, stats: GateStats) -> None:
        for one in self.each:
            one.add_ratio(stats)


def _by_teacher(
    config: TrainConfig,
    teachers: Any,
    hidden: Any,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    stats: Any,
    this: ThisStep,
) -> LossFunction:
    """`gated_loss` with several teachers: that of a micro-batch's own."""
    taught = this.taught
    assert taught is not None
    losses: dict[str, LossFunction] = {}
    for name, own in config.by_teacher.items():
        weight, usual = config.teachers[name].weight, taught.usual[name]
        theirs = this._replace(usual=usual, taught=None, teacher_weight=weight)
        both = _Both(stats, stats.parts[name])
        losses[name] = gated_loss(own, teachers.of[name], hidden.of[name], vocab_size, tp_group, both, theirs)
    first = next(iter(losses))  # for a micro-batch of dummies

    def loss(model: Student, batch: MicroBatch, hidden_NH: Tensor) -> tuple[Tensor, int]:
        found = {taught.teacher_of_row[row] for row in batch.rows} or {first}
        if len(found) > 1:
            raise ValueError(f"a micro-batch has rows of the teachers {', '.join(sorted(found))}: it must be of one")
        return losses[found.pop()](model, batch, hidden_NH)

    return loss


def _of_tokens(advantage_B: Sequence[float], batch: MicroBatch) -> Tensor:
    """Each token's advantage [M]: its response's."""
    of_rows = torch.tensor([advantage_B[row] for row in batch.rows], dtype=torch.float32)
    advantage_M = of_rows.repeat_interleave(batch.cu_responses.diff().long()).to(batch.sampled_ids_M.device)
    return advantage_M if batch.context is None else advantage_M[batch.context.index_N]
