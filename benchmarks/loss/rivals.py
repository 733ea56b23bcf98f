"""The losses of other systems as contenders of `bench loss`: TRL's and Liger's packages, NeMo-RL's form written anew.

    trl       GKD loss at beta = 1 (reverse KL over the whole vocabulary) on both models' whole logits
    liger     its fused linear loss at beta = 1: the same KL in chunks of hidden states, gradients formed in the forward
    nemo_rl   reverse KL on the teacher's top-k, both renormalised; the student's whole logits, its log-probabilities
              at the top-k gathered chunk by chunk, with a backward that forms each chunk's softmax again

Ours that has the same loss: `ours_full` of the first two; of the last `local_support_matching`, which costs what `ours`
costs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Inputs(NamedTuple):
    """What the loss takes. The student's two tensors want gradients; `_buffer` has the weight's buffer, if any."""

    student_hidden_NH: Tensor
    student_weight_VH: Tensor
    teacher_hidden_NH: Tensor
    teacher_weight_VH: Tensor
    sampled_ids_N: Tensor
    cu_seqlens: list[int]
    chunk: int


def trl(x: Inputs) -> Tensor | None:
    """TRL's GKD loss, called as its trainer does: on both models' logits, [1, N, V]."""
    from trl.experimental.gkd import GKDTrainer  # type: ignore[import-not-found]  # in .venv-bench

    student_logits_1NV = (x.student_hidden_NH @ x.student_weight_VH.t()).unsqueeze(0)
    with torch.no_grad():
        teacher_logits_1NV = (x.teacher_hidden_NH @ x.teacher_weight_VH.t()).unsqueeze(0)
    tokens = len(x.sampled_ids_N)
    loss = GKDTrainer.generalized_jsd_loss(student_logits_1NV, teacher_logits_1NV, beta=1.0, num_items_in_batch=tokens)
    del student_logits_1NV, teacher_logits_1NV
    loss.backward()
    return loss


def liger(x: Inputs) -> Tensor | None:
    """Liger's fused linear JSD loss without its hard loss, which it leaves out then; not compiled, like the others."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found]  # in .venv-bench

    fused = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False, chunk_size=x.chunk
    )
    teacher = x.teacher_hidden_NH, x.teacher_weight_VH
    loss: Tensor = fused(x.student_hidden_NH, x.student_weight_VH, *teacher, x.sampled_ids_N)
    loss.backward()
    return loss.detach()


class _GatheredLogProbs(torch.autograd.Function):
    """log-softmax of whole logits at a few ids, a chunk of tokens at a time; nothing but the logits is kept."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, ids_NK: Tensor, chunk: int) -> Tensor:
        ctx.save_for_backward(logits_NV, ids_NK)
        ctx.chunk = chunk
        return torch.cat(
            [
                logits_CV.float().log_softmax(-1).gather(1, ids_CK)
                for logits_CV, ids_CK in zip(logits_NV.split(chunk), ids_NK.split(chunk), strict=True)
            ]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NK: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, ids_NK = ctx.saved_tensors
        grads = []
        for logits_CV, ids_CK, grad_CK in zip(*(t.split(ctx.chunk) for t in (logits_NV, ids_NK, grad_NK)), strict=True):
            grad_CV = logits_CV.float().softmax(-1).mul_(-grad_CK.sum(1, keepdim=True))
            grads.append(grad_CV.scatter_add_(1, ids_CK, grad_CK).to(logits_CV.dtype))
        return torch.cat(grads), None, None


def nemo_rl(x: Inputs, k: int = 16) -> Tensor | None:
    """NeMo-RL's distillation loss, kl_type = reverse: the teacher's pass hands over its top-k logits alone."""
    with torch.no_grad():
        tops = [(part_CH @ x.teacher_weight_VH.t()).topk(k, dim=-1) for part_CH in x.teacher_hidden_NH.split(x.chunk)]
        teacher_logits_NK, ids_NK = (torch.cat(parts) for parts in zip(*tops, strict=True))
    student_logits_NV = x.student_hidden_NH @ x.student_weight_VH.t()
    student_logp_NK = _GatheredLogProbs.apply(student_logits_NV, ids_NK, x.chunk).log_softmax(-1)
    teacher_logp_NK = teacher_logits_NK.float().log_softmax(-1)
    loss_sum = F.kl_div(teacher_logp_NK, student_logp_NK, reduction="sum", log_target=True)
    del student_logits_NV
    loss_sum.backward()
    return loss_sum.detach() / len(x.sampled_ids_N)
