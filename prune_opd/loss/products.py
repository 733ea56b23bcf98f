"""The products of the output head, whose sums stay in fp32 where the inputs are in bf16.

A product of two bf16 matrices is rounded to bf16, 8 bits, when torch returns it. Of two models that have nearly
converged those bits hold little of the difference: the gradient was 10 % off for close models and half of it was wrong
for nearly equal ones. The inputs are as coarse as they are; what is summed over them need not be.

On CUDA the hardware's fp32 sums are asked for (`out_dtype`). Elsewhere blocks of the weight are cast up, so that there
is never a whole copy of it in fp32. Inputs that are as wide as the result are multiplied plainly.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 1 << 19  # numbers of a weight that are cast up at a time: 2 MiB in fp32
WEIGHT_ROWS = 8192  # of a weight gradient that are multiplied at a time where its dtype is not the product's


def logits_(hidden_CH: Tensor, weight_VH: Tensor, out_CV: Tensor) -> Tensor:
    """hidden @ weightᵀ into `out_CV`, of a dtype at least as wide as the inputs'."""
    if out_CV.dtype == weight_VH.dtype:
        return torch.mm(hidden_CH, weight_VH.t(), out=out_CV)
    if _on_tensor_cores(weight_VH, out_CV.dtype):
        return torch.mm(hidden_CH, weight_VH.t(), out_dtype=out_CV.dtype, out=out_CV)
    hidden_CH = hidden_CH.to(out_CV.dtype)
    for rows in _blocks(weight_VH):
        torch.mm(hidden_CH, weight_VH[rows].to(out_CV.dtype).t(), out=out_CV[:, rows])
    return out_CV


def gradient_dtype(weight_VH: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In which both products with the logits' gradient, which is of `dtype`, take it."""
    return weight_VH.dtype if _on_tensor_cores(weight_VH, dtype) else dtype


def ready_(grad_logits_CV: Tensor, weight_VH: Tensor, spare_CV: Tensor) -> Tensor:
    """The gradient as both products of it take it: on tensor cores rounded to the weight's dtype, in the spare memory.

    spare_CV: of the gradient's dtype, with rows at least as long.
    """
    dtype = gradient_dtype(weight_VH, grad_logits_CV.dtype)
    if dtype == grad_logits_CV.dtype:
        return grad_logits_CV
    return spare_CV.view(dtype)[:, : grad_logits_CV.shape[1]].copy_(grad_logits_CV)


def hidden_gradient_(grad_logits_CV: Tensor, weight_VH: Tensor, out_CH: Tensor, dtype: torch.dtype) -> None:
    """grad_logits @ weight into `out_CH`, with sums in `dtype`: fp32 for bf16. grad_logits_CV: from `ready_`."""
    if out_CH.dtype == weight_VH.dtype == grad_logits_CV.dtype:
        torch.mm(grad_logits_CV, weight_VH, out=out_CH)
        return
    if _on_tensor_cores(weight_VH, dtype):
        torch.mm(grad_logits_CV, weight_VH, out_dtype=dtype, out=out_CH)
        return
    grad_CH = grad_logits_CV.new_zeros(out_CH.shape)
    for rows in _blocks(weight_VH):
        grad_CH.addmm_(grad_logits_CV[:, rows], weight_VH[rows].to(dtype))
    out_CH.copy_(grad_CH)


def add_weight_gradient_(weight_grad_VH: Tensor, grad_logits_CV: Tensor, hidden_CH: Tensor, dtype: torch.dtype) -> None:
    """weight_grad += grad_logitsᵀ @ hidden, a product with sums in `dtype`. grad_logits_CV: from `ready_`."""
    on_tensor_cores = _on_tensor_cores(hidden_CH, dtype)
    if not on_tensor_cores:
        hidden_CH = hidden_CH.to(dtype)
    if weight_grad_VH.dtype == dtype and not on_tensor_cores:
        weight_grad_VH.addmm_(grad_logits_CV.t(), hidden_CH)
        return
    if weight_grad_VH.dtype == dtype:
        torch.addmm(weight_grad_VH, grad_logits_CV.t(), hidden_CH, out_dtype=dtype, out=weight_grad_VH)
        return
    # A few rows at a time, not a second [V, H].
    blocks = zip(weight_grad_VH.split(WEIGHT_ROWS), grad_logits_CV.split(WEIGHT_ROWS, dim=1), strict=True)
    for weight_RH, grad_logits_CR in blocks:
        if on_tensor_cores:
            weight_RH += torch.mm(grad_logits_CR.t(), hidden_CH, out_dtype=dtype)
        else:
            weight_RH += grad_logits_CR.t() @ hidden_CH


def _on_tensor_cores(inputs: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch has a product of `inputs` with a result, and sums, of `dtype`."""
    return inputs.is_cuda and inputs.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32


def _blocks(weight_VH: Tensor) -> Iterator[slice]:
    rows = max(BLOCK // max(weight_VH.shape[1], 1), 1)
    return (slice(begin, begin + rows) for begin in range(0, len(weight_VH), rows))
