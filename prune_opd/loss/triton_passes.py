"""A chunk's passes through the logits by kernels of our own, each of which goes through them once.

    statistics    both models' block maxima, maxima and sums                      read both
    rest          Σ exp outside a support, where objective.tail = bucket          read both
    divergence    JSD and priced KL: value and slopes' sum; other KL have theirs   read what they need
    gradient      ∂ℓ/∂logit in the place of the student's logits, or in bf16      read what it needs, write

The logits stay what they are until the gradient is written over them, and no scratch memory is needed. Every launch is
an operator of torch that says what it reads and writes, so that the count (benchmarks/loss/count.py) and a rehearsal
see it on tensors without numbers. Off until a GPU has timed it (docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from prune_opd.config import ObjectiveConfig
from prune_opd.errors import ConfigError
from prune_opd.loss.passes import Passes, Slopes
from prune_opd.loss.products import gradient_dtype
from prune_opd.loss.vocab_parallel import (
    BLOCK,
    BothLogits,
    TopK,
    group_size,
    local_columns,
    topk_together,
)
from prune_opd.loss.vocab_sums import Apart, VocabSums, only_known_
from prune_opd.method.objective import is_priced, on_vocabulary

TILE = 2048  # columns that a program works on at a time: a power of two, and a multiple of `BLOCK`
WARPS = 8


class TritonPasses(Passes):
    """As `Passes`; the same numbers but for rounding."""

    def __init__(self, both: BothLogits, part: slice, objective: ObjectiveConfig) -> None:
        super().__init__(both, part, objective)
        self._prices: list[Tensor] = []  # columns and log q of a teacher that is known at a few ids

    def top(self, k: int) -> TopK:
        maxima_2NB, self._sums_8N = statistics(self.logits_2NW, BLOCK)
        return topk_together(self.logits_2NW, k, self.shards, maxima_2NB)

    def sums(self, maximum_2N1: Tensor, apart: Apart | None) -> VocabSums:
        self._maximum_2N = maximum_2N1.squeeze(2)
        own_2N, total_2N, cross_22N = self._sums_8N.split([2, 2, 4])
        cross_22N = cross_22N.view(2, 2, -1)
        if group_size(self.shards[0].group) > 1:
            # From this rank's maxima to those of all: l and m go down, e and f shrink.
            down_2N = own_2N - self._maximum_2N
            cross_22N = cross_22N.addcmul(total_2N[:, None], down_2N[None])
            cross_22N, total_2N = cross_22N * down_2N.exp()[:, None], total_2N * down_2N.exp()
        rest_2N1 = None
        if apart is not None:
            of_both = zip(self.logits_2NW, self._maximum_2N, _only(*apart), strict=True)
            rest_2N1 = torch.stack([rest(*of_one) for of_one in of_both]).unsqueeze(2)
        return only_known_(VocabSums(total_2N.unsqueeze(2), cross_22N.permute(2, 0, 1), rest_2N1), self.shards)

    def _divergence(self, log_total_2N1: Tensor, ids_NK: Tensor, teacher_logp_NK: Tensor) -> Tensor:
        student_NW, teacher_NW = self.logits_2NW
        if is_priced(self.objective):
            column_NK = _only(*local_columns(ids_NK, self.shards[0]))
            self._prices = [column_NK, teacher_logp_NK.log_softmax(dim=-1)]
        norms_4N = torch.cat([self._maximum_2N, log_total_2N1.squeeze(2)])
        return divergence(student_NW, None if self._prices else teacher_NW, norms_4N, self._prices, *self._kind())

    def gradient(self, slopes: Slopes, sums: VocabSums, log_total_2N1: Tensor) -> Tensor:
        (student_NW, teacher_NW), weight_N1 = self.logits_2NW, slopes.weight_N1
        on_vocabulary = weight_N1 is not None
        total_1N, weight_1N = slopes.total_N1.T, (slopes.total_N1 if weight_N1 is None else weight_N1).T
        given = (
            teacher_NW if on_vocabulary and not self._prices else None,
            torch.cat([self._maximum_2N, log_total_2N1.squeeze(2), total_1N, weight_1N]),
            [slopes.column_NK.contiguous(), slopes.slope_NK.contiguous()],
            self._prices,
            *self._kind(),
        )
        dtype = gradient_dtype(self._student.weight_VH, student_NW.dtype)
        if dtype != student_NW.dtype:
            return gradient_as(student_NW, *given, dtype)
        gradient_(student_NW, *given)
        return student_NW

    def ready(self, grad_logits_NW: Tensor) -> Tensor:
        return grad_logits_NW[:, : self._student.shard.rows]

    def _kind(self) -> tuple[str, list[float]]:
        """What the kernels call the objective, and its share and outside_logp."""
        objective = self.objective
        if not on_vocabulary(objective):
            return "candidates", [0, 0]
        if is_priced(objective):
            return "priced", [0, objective.outside_logp]
        if self._kl_share is not None:
            return "kl", [self._kl_share, 0]
        if objective.name == "full_vocab_jsd":
            return "jsd", [objective.beta, 0]
        raise ConfigError(
            f"objective.kernels = triton has no kernel for objective.name = {objective.name}: "
            "set objective.kernels=torch"
        )


# ---------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("prune_opd::loss_statistics", mutates_args=())
def statistics(logits_2NW: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Block maxima [2, N, W / block], and maxima and sums less this rank's maxima [8, N] (triton_kernels.py)."""
    maxima_2NB, sums_8N = _statistics_shape(logits_2NW, block)
    if (rows := logits_2NW.shape[1]) > 0:
        tile = {"TILE": _tile(logits_2NW), "BLOCK": block}
        _kernels().statistics_kernel[rows,](_logits(*logits_2NW), maxima_2NB, sums_8N, **tile, num_warps=WARPS)
    return maxima_2NB, sums_8N


@statistics.register_fake
def _statistics_shape(logits_2NW: Tensor, block: int) -> tuple[Tensor, Tensor]:
    _, rows, width = logits_2NW.shape
    return logits_2NW.new_empty(2, rows, width // block), logits_2NW.new_empty(8, rows)


@torch.library.custom_op("prune_opd::loss_rest", mutates_args=())
def rest(logits_NW: Tensor, maximum_N: Tensor, column_NK: Tensor) -> Tensor:
    """Σ exp(logit − maximum) [N] but for the columns; those below 0 are none."""
    rest_N = _rest_shape(logits_NW, maximum_N, column_NK)
    if rows := len(logits_NW):
        given = (maximum_N.contiguous(), column_NK.contiguous(), rest_N, logits_NW.shape[1], column_NK.shape[1])
        _kernels().rest_kernel[rows,](logits_NW, *given, TILE=_tile(logits_NW), num_warps=WARPS)
    return rest_N


@rest.register_fake
def _rest_shape(logits_NW: Tensor, maximum_N: Tensor, column_NK: Tensor) -> Tensor:
    return logits_NW.new_empty(len(logits_NW))


@torch.library.custom_op("prune_opd::loss_divergence", mutates_args=())
def divergence(
    student_NW: Tensor,
    teacher_NW: Tensor | None,
    norms_4N: Tensor,
    prices: Sequence[Tensor],
    kind: str,
    constants: Sequence[float],
) -> Tensor:
    """Value and slopes' sum [2, N] of an objective on the vocabulary. norms_4N: maxima, log-totals of both models.

    prices: columns and log q of a teacher that is known at a few ids; else teacher_NW.
    """
    sums_2N = _divergence_shape(student_NW, teacher_NW, norms_4N, prices, kind, constants)
    if rows := len(student_NW):
        kernels = _kernels()
        given = (_logits(student_NW, teacher_NW), norms_4N, sums_2N, _points(prices, student_NW))
        launch = kernels.divergence_kernel[rows,]
        launch(*given, kernels.Constants(*constants), KIND=kind, TILE=_tile(student_NW), num_warps=WARPS)
    return sums_2N


@divergence.register_fake
def _divergence_shape(
    student_NW: Tensor,
    teacher_NW: Tensor | None,
    norms_4N: Tensor,
    prices: Sequence[Tensor],
    kind: str,
    constants: Sequence[float],
) -> Tensor:
    return student_NW.new_empty(2, len(student_NW))


@torch.library.custom_op("prune_opd::loss_gradient_", mutates_args=("student_NW",))
def gradient_(
    student_NW: Tensor,
    teacher_NW: Tensor | None,
    norms_6N: Tensor,
    slopes: Sequence[Tensor],
    prices: Sequence[Tensor],
    kind: str,
    constants: Sequence[float],
) -> None:
    """∂ℓ/∂logit over the student's logits. norms_6N: also Σ c, and the weight of an objective on the vocabulary.

    slopes: columns and c at the candidates.
    """
    _gradient(student_NW, student_NW, teacher_NW, norms_6N, [slopes, prices], kind, constants)


@gradient_.register_fake
def _(
    student_NW: Tensor,
    teacher_NW: Tensor | None,
    norms_6N: Tensor,
    slopes: Sequence[Tensor],
    prices: Sequence[Tensor],
    kind: str,
    constants: Sequence[float],
) -> None:
    pass


@torch.library.custom_op("prune_opd::loss_gradient_as", mutates_args=())
def gradient_as(
    student_NW: Tensor,
    teacher_NW: Tensor | None,
    norms_6N: Tensor,
    slopes: Sequence[Tensor],
    prices: Sequence[Tensor],
    kind: str,
    constants: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """The same, rounded, [N, W] of another dtype."""
    grad_NW = torch.empty_like(student_NW, dtype=dtype)
    _gradient(grad_NW, student_NW, teacher_NW, norms_6N, [slopes, prices], kind, constants)
    return grad_NW


@gradient_as.register_fake
def _(
    student_NW: Tensor,
    teacher_NW: Tensor | None,
    norms_6N: Tensor,
    slopes: Sequence[Tensor],
    prices: Sequence[Tensor],
    kind: str,
    constants: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty_like(student_NW, dtype=dtype)


def _gradient(
    grad_NW: Tensor,
    student_NW: Tensor,
    teacher_NW: Tensor | None,
    norms_6N: Tensor,
    points: Sequence[Sequence[Tensor]],
    kind: str,
    constants: Sequence[float],
) -> None:
    if not (rows := len(student_NW)):
        return
    kernels = _kernels()
    slopes, prices = (_points(part, student_NW) for part in points)
    given = (_logits(student_NW, teacher_NW), norms_6N, grad_NW, slopes, prices, kernels.Constants(*constants))
    kernels.gradient_kernel[rows,](*given, KIND=kind, TILE=_tile(student_NW), num_warps=WARPS)


# ---------------------------------------------------------------------------------------------------- launches


def _kernels() -> ModuleType:
    """The kernels. Imported where they are launched: Triton need not be there for anything else."""
    from prune_opd.loss import triton_kernels

    return triton_kernels


def _logits(student_NW: Tensor, teacher_NW: Tensor | None) -> Any:
    return _kernels().Logits(student_NW, student_NW if teacher_NW is None else teacher_NW, student_NW.shape[1])


def _points(part: Sequence[Tensor], like: Tensor) -> Any:
    """Columns and numbers of `part`; none where it is empty."""
    column_NK, number_NK = part or (like.new_empty(0, dtype=torch.int64), like.new_empty(0))
    return _kernels().Points(column_NK, number_NK, column_NK.shape[1] if part else 0)


def _tile(logits: Tensor) -> int:
    """No wider than the logits are."""
    return min(TILE, 1 << (logits.shape[-1] - 1).bit_length())


def _only(column_NK: Tensor, mine_NK: Tensor | None) -> Tensor:
    """Columns, below 0 where another rank has the id."""
    return column_NK.contiguous() if mine_NK is None else column_NK.masked_fill(~mine_NK, -1)
