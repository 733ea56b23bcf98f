"""What `distill_loss` refuses: settings and tensors that do not fit, before it computes, and broken numbers after."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from prune_opd.config import GateConfig, ObjectiveConfig, WeightingConfig
from prune_opd.errors import ConfigError, NotFiniteLogitsError
from prune_opd.loss.context import ContextShard
from prune_opd.loss.vocab_parallel import OutputHead


def checked_offsets(
    student: OutputHead,
    teacher: OutputHead,
    sampled_ids_N: Tensor,
    cu_seqlens: Tensor | Sequence[int],
    gate: GateConfig | None,
    objective: ObjectiveConfig,
    weighting: WeightingConfig,
    chunk: int,
    context: ContextShard | None,
) -> list[int]:
    """The offsets on the host, or one error that names what does not fit."""
    if chunk < 1:
        raise ConfigError(f"chunk = {chunk} is out of range: give the tokens to work on at a time, at least 1")
    vocab_size = student.shard.vocab_size
    sizes = {"objective.k": objective.k}
    if gate is not None:
        sizes["gate.k"] = gate.k
    if weighting.name == "entropy_aware":
        sizes["weighting.forward_k"] = weighting.forward_k
    for name, k in sizes.items():
        if k > vocab_size:
            raise ConfigError(
                f"{name} = {k} is larger than vocab_size = {vocab_size}: there are not so many candidates"
            )
    tokens = len(student.hidden_NH)
    if len(teacher.hidden_NH) != tokens:
        raise ValueError(
            f"teacher_hidden has {len(teacher.hidden_NH)} tokens and student_hidden {tokens}: "
            "both models must have seen the same packed response tokens"
        )
    if sampled_ids_N.shape != (tokens,) or sampled_ids_N.is_floating_point():
        raise ValueError(
            f"sampled_ids is {sampled_ids_N.dtype} {list(sampled_ids_N.shape)}: "
            f"one integer id per token of student_hidden is needed, [{tokens}]"
        )
    offsets = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    if not isinstance(offsets, list) or not offsets or not all(isinstance(offset, int) for offset in offsets):
        raise ValueError(f"cu_seqlens = {offsets!r}: a flat list of whole numbers is needed, from 0 to {tokens}")
    if context is not None and len(context.index_N) != tokens:
        raise ValueError(
            f"context.index has {len(context.index_N)} places and student_hidden {tokens} tokens: give one for each"
        )
    all_tokens, covered = (tokens, "student_hidden") if context is None else (context.tokens, "context")
    if offsets[0] != 0 or offsets[-1] != all_tokens:
        raise ValueError(
            f"cu_seqlens runs from {offsets[0]} to {offsets[-1]}: "
            f"it must cover the tokens of {covered}, 0 to {all_tokens}"
        )
    if any(after < before for before, after in pairwise(offsets)):
        raise ValueError(
            f"cu_seqlens = {offsets} decreases: the offset of a response is never below that of the one before"
        )
    return offsets


def check_stale(stale_logp_N: Tensor | None, sampled_ids_N: Tensor) -> None:
    if stale_logp_N is not None and stale_logp_N.shape != sampled_ids_N.shape:
        raise ValueError(
            f"stale_logp is {list(stale_logp_N.shape)} and sampled_ids {list(sampled_ids_N.shape)}: give one number "
            "for each sampled token, NaN for those of this step"
        )


def check_buffer(weight_grad: Tensor, weight_VH: Tensor) -> None:
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
