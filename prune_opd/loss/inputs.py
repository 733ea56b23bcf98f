"""What `distill_loss` takes, and what it refuses: what does not fit before it computes, and broken numbers after."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from prune_opd.config import GateConfig, ObjectiveConfig, WeightingConfig
from prune_opd.config.kernels import kernels_problem
from prune_opd.errors import ConfigError, NotFiniteLogitsError
from prune_opd.loss.context import ContextShard
from prune_opd.loss.vocab_parallel import OutputHead
from prune_opd.method.agreement import needs_kl
from prune_opd.method.calibration import Usual
from prune_opd.method.objective import has_baseline
from prune_opd.method.weighting import added_objective, needs_reverse_kl


class Head(NamedTuple):
    """One model at its output head. Hidden size and dtype of both tensors agree; the models' may differ."""

    # Last hidden states (final norm applied) at the positions that predict the response tokens, in order; the same on
    # all ranks of a tensor-parallel group.
    hidden_NH: Tensor
    # Output weight; with a tensor-parallel group this rank's shard of the (padded) vocabulary.
    weight_VH: Tensor


class Tokens(NamedTuple):
    """The N response tokens of a micro-batch, packed end to end."""

    sampled_ids_N: Tensor  # y_t, global token ids
    cu_seqlens: Tensor | Sequence[int]  # the responses' B + 1 offsets, from 0 to N; empty ones allowed
    vocab_size: int  # ids that exist; rows of an output weight beyond it are padding
    # Which of a micro-batch's tokens these N are, when context-parallel ranks share it. cu_seqlens is then of all of
    # them, and loss_sum, token_count and the weight's gradient are this rank's: add them up over the group.
    context: ContextShard | None = None
    # Of tokens that an older student has sampled, log p with which it did; NaN at the others. Their weight is
    # multiplied by the ratio of the student's p(y_t) to that, clipped to 1 ± objective.clip, as a constant. In an
    # `OldPolicy` it is in the weights already.
    stale_logp_N: Tensor | None = None
    # log p that the rollout engine gave the token, NaN at stale ones: what `objective.mismatch` corrects by.
    engine_logp_N: Tensor | None = None
    # What a task's reward gives to each token (method/advantage.py); its term is added to the objective's.
    advantage_N: Tensor | None = None


class Method(NamedTuple):
    """What is learnt from a token, and how much it counts."""

    gate: GateConfig | None  # None for plain distillation: weight 1, no events
    objective: ObjectiveConfig  # its temperature divides both models' logits
    weighting: WeightingConfig = WeightingConfig()  # one of the literature, beside the gate
    usual: Usual | None = None  # what is usual for the pair, for a gate that looks for change points
    # Ids that end a response for either model, ascending: what both think of them goes to the statistics, and with
    # objective.ends = class they are one outcome (loss/ends.py).
    terminal_ids: tuple[int, ...] = ()
    correct_stale: bool = True  # weigh stale tokens by the ratio of both students' probabilities
    teacher_weight: float = 1.0  # of the objective, with several teachers; the statistics' weights are without it

    @property
    def objectives(self) -> list[ObjectiveConfig]:
        """The objective, and the one that the weighting adds to it, if any."""
        added = added_objective(self.weighting)
        return [self.objective] if added is None else [self.objective, added]

    @property
    def needs_reverse_kl(self) -> bool:
        """Whether the reverse KL over the vocabulary is asked for, so that ranks need the same ids of both models."""
        return needs_reverse_kl(self.weighting) or has_baseline(self.objective) or needs_kl(self.gate)

    @property
    def end_class(self) -> tuple[int, ...]:
        """Ids that are one outcome; empty where each is its own."""
        return self.terminal_ids if self.objective.ends == "class" and len(self.terminal_ids) > 1 else ()

    @property
    def gate_k(self) -> int:
        """Size of the top-k sets whose overlap is measured."""
        return self.objective.k if self.gate is None else self.gate.k


def check_kernels(kernels: str, device: torch.device) -> None:
    """ConfigError where `objective.kernels` cannot run on the tensors' device. Tensors without numbers need none."""
    if device.type != "meta" and (problem := kernels_problem(kernels, device.type == "cuda")):
        raise ConfigError(problem)


def check_options(chunk: int, policy: object) -> None:
    if chunk < 1:
        raise ConfigError(f"chunk = {chunk} is out of range: give the tokens to work on at a time, at least 1")
    if isinstance(policy, str) and policy != "keep":
        raise ConfigError(f"policy = {policy!r} is unknown: give None, 'keep', or the policy that a call has kept")


def checked_offsets(student: OutputHead, teacher: OutputHead, tokens: Tokens, method: Method) -> list[int]:
    """The responses' offsets on the host, or one error that names what does not fit."""
    vocab_size = tokens.vocab_size
    _check_ends(method, vocab_size)
    outcomes = vocab_size - max(len(method.end_class) - 1, 0)
    sizes = {"objective.k": method.objective.k}
    if method.gate is not None:
        sizes["gate.k"] = method.gate.k
    if added_objective(method.weighting) is not None:
        sizes["weighting.forward_k"] = method.weighting.forward_k
    for name, k in sizes.items():
        if k > outcomes:
            less = f" less {vocab_size - outcomes} ends of the same class" if outcomes < vocab_size else ""
            raise ConfigError(
                f"{name} = {k} is larger than vocab_size = {vocab_size}{less}: there are not so many candidates"
            )
    count, sampled_ids_N = len(student.hidden_NH), tokens.sampled_ids_N
    if len(teacher.hidden_NH) != count:
        raise ValueError(
            f"teacher_hidden has {len(teacher.hidden_NH)} tokens and student_hidden {count}: "
            "both models must have seen the same packed response tokens"
        )
    if sampled_ids_N.shape != (count,) or sampled_ids_N.is_floating_point():
        raise ValueError(
            f"sampled_ids is {sampled_ids_N.dtype} {list(sampled_ids_N.shape)}: "
            f"one integer id per token of student_hidden is needed, [{count}]"
        )
    numbers = {
        "stale_logp": tokens.stale_logp_N,
        "engine_logp": tokens.engine_logp_N,
        "advantage": tokens.advantage_N,
    }
    for name, value_N in numbers.items():
        if value_N is not None and value_N.shape != sampled_ids_N.shape:
            raise ValueError(
                f"{name} is {list(value_N.shape)} and sampled_ids {list(sampled_ids_N.shape)}: give one number for "
                "each sampled token, NaN where there is none"
            )
    if method.objective.mismatch != "none" and tokens.engine_logp_N is None:
        raise ValueError(
            f"objective.mismatch = {method.objective.mismatch} and no engine_logp: give the rollout engine's "
            "log-probability of each sampled token"
        )
    if tokens.context is not None and len(tokens.context.index_N) != count:
        raise ValueError(
            f"context.index has {len(tokens.context.index_N)} places and student_hidden {count} tokens: "
            "give one for each"
        )
    return _offsets(tokens)


def _check_ends(method: Method, vocab_size: int) -> None:
    ids = method.terminal_ids
    if list(ids) != sorted(set(ids)) or any(not 0 <= i < vocab_size for i in ids):
        raise ConfigError(f"terminal_ids = {ids}: give different ids of 0..{vocab_size - 1}, ascending")
    if method.objective.ends == "class" and not ids:
        raise ConfigError(
            "objective.ends = class without terminal_ids: name the ids that end a response, or set objective.ends=as_is"
        )


def _offsets(tokens: Tokens) -> list[int]:
    cu_seqlens, context = tokens.cu_seqlens, tokens.context
    count, covered = (len(tokens.sampled_ids_N), "student_hidden") if context is None else (context.tokens, "context")
    offsets = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    if not isinstance(offsets, list) or not offsets or not all(isinstance(offset, int) for offset in offsets):
        raise ValueError(f"cu_seqlens = {offsets!r}: a flat list of whole numbers is needed, from 0 to {count}")
    if offsets[0] != 0 or offsets[-1] != count:
        raise ValueError(
            f"cu_seqlens runs from {offsets[0]} to {offsets[-1]}: it must cover the tokens of {covered}, 0 to {count}"
        )
    if any(after < before for before, after in pairwise(offsets)):
        raise ValueError(
            f"cu_seqlens = {offsets} decreases: the offset of a response is never below that of the one before"
        )
    return offsets


def check_buffer(weight_grad: Tensor, weight_VH: Tensor) -> None:
    """ValueError for a `weight_grad` that the gradient of `weight_VH` cannot be added to."""
    fits = (
        weight_grad.shape == weight_VH.shape
        and weight_grad.device == weight_VH.device
        and weight_grad.dtype in (torch.float32, weight_VH.dtype)
        and not weight_grad.requires_grad
    )
    if not fits or not weight_VH.requires_grad:
        raise ValueError(
            f"weight_grad is {_describe(weight_grad)} and student_weight is {_describe(weight_VH)}: a buffer is needed "
            "of the weight's shape, on its device, in float32 or its dtype, beside a weight that requires a gradient"
        )


def _describe(tensor: Tensor) -> str:
    wants = ", requires_grad" if tensor.requires_grad else ""
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}{wants}"


def raise_if_broken(broken_3: Tensor, vocab_size: int) -> None:
    """One wait for the whole call. All ranks of a group have the same numbers, and so raise together."""
    student, teacher, outside = broken_3.tolist()
    for name, broken in (("student", student), ("teacher", teacher)):
        if broken:
            raise NotFiniteLogitsError(
                f"{name}_hidden gives logits that are not finite: "
                f"look for NaN or infinity in the {name}'s hidden states and output weight"
            )
    if outside:
        raise ValueError(
            f"sampled_ids has an id outside 0..{vocab_size - 1}: student, teacher and rollout need one vocabulary"
        )
