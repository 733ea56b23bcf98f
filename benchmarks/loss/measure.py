"""One measurement of the loss: one contender, forward and backward, in a process of its own.

    ours            distill_loss with its default gate and objective
    ours_no_metrics the same without the sums that only metrics need: what those cost
    ours_no_buffer  the same, where the weight has no gradient buffer yet: it allocates and returns its own gradient
    naive           the same loss written plainly: fp32 logits of all tokens × vocabulary of both models, autograd
    ours_full       distill_loss with full_vocab_reverse_kl and no gate: the loss of trl and liger
    trl, liger, nemo_rl   those of other systems (rivals.py)
    floor           the matrix products of `ours` alone, in the same chunks: no loss can do without them; in bf16 they
                    are those whose sums stay in fp32 (prune_opd/loss/products.py), as ours needs them

As in training, the weight's gradient buffer is there before the loss (but for `ours_no_buffer`), and every contender
adds its gradient to it: autograd to `.grad`, ours through `weight_grad`. Likewise the loss that is back-propagated is
the sum over the tokens.

How memory is measured. The inputs are made, and the contender runs once on a toy input, so that libraries, threads
and their buffers are there. Then the kernel's peak of this process's resident memory (VmHWM) is reset; a whole call
follows, and `extra` is the peak less what was resident before it: everything beyond the inputs and that buffer. The
allocator has kept nothing that could hide memory: blocks of this size are mapped when they are asked for and unmapped
when they are freed.

How time is measured. That first call pays for cold caches; the calls after it are timed, wall clock and CPU time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common import answer, cpu_time, peak_memory, reset_peak
from benchmarks.loss import rivals
from benchmarks.loss.rivals import Inputs
from prune_opd.config import GateConfig, ObjectiveConfig
from prune_opd.loss import Head, Method, Tokens, distill_loss, passes
from prune_opd.loss.products import add_weight_gradient_, hidden_gradient_, logits_
from prune_opd.loss.vocab_parallel import row_blocks
from prune_opd.loss.vocab_sums import Apart, VocabSums
from prune_opd.method.gate import apply_gate_packed, overlap_events, overlap_ratio

RESPONSES = 4  # that the tokens are split into
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# ---------------------------------------------------------------------------------------------------- contenders


def ours(x: Inputs) -> Tensor | None:
    """distill_loss as a training step calls it, but for the chunk size."""
    return _fused(x, Method(GateConfig(), ObjectiveConfig()))


def ours_full(x: Inputs) -> Tensor | None:
    """The whole vocabulary's reverse KL, with no gate: what trl and liger compute."""
    return _fused(x, Method(None, ObjectiveConfig("full_vocab_reverse_kl")))


def ours_no_metrics(x: Inputs) -> Tensor | None:
    """`ours` with the normalisers alone; entropies and full KL come out as NaN."""
    with mock.patch.object(passes, "vocab_sums_", _normalisers_):
        return ours(x)


def _normalisers_(
    logits_2NW: Tensor, scratch_2RW: Tensor, maximum_2N1: Tensor, keep_logs: bool, apart: Apart | None
) -> VocabSums:
    """What `vocab_sums_` would be without metrics: logits to exponentials in their place, and the sums of those."""
    assert not keep_logs and apart is None  # the published form needs neither
    total_2N1 = torch.empty_like(maximum_2N1)
    for part in row_blocks(logits_2NW):
        exp_2RW = logits_2NW[:, part].sub_(maximum_2N1[:, part]).exp_()
        torch.sum(exp_2RW, dim=2, keepdim=True, out=total_2N1[:, part])
    return VocabSums(total_2N1, total_2N1.new_full((logits_2NW.shape[1], 2, 2), torch.nan))


def _fused(x: Inputs, method: Method) -> Tensor:
    loss_sum, tokens, _ = distill_loss(
        Head(x.student_hidden_NH, x.student_weight_VH),
        Head(x.teacher_hidden_NH, x.teacher_weight_VH),
        Tokens(x.sampled_ids_N, x.cu_seqlens, vocab_size=len(x.student_weight_VH)),
        method,
        chunk=x.chunk,
        weight_grad=_buffer(x),
    )
    loss_sum.backward()
    return loss_sum.detach() / tokens


def naive(x: Inputs) -> Tensor | None:
    """The same loss from method.md, line by line. Nothing is held longer than autograd or the next line needs it."""
    gate, k = GateConfig(), ObjectiveConfig().k
    student_logp_NV = (x.student_hidden_NH @ x.student_weight_VH.t()).float().log_softmax(dim=-1)
    with torch.no_grad():
        teacher_logp_NV = (x.teacher_hidden_NH @ x.teacher_weight_VH.t()).float().log_softmax(dim=-1)
        student_ids_NK = student_logp_NV.topk(k, dim=-1).indices
        teacher_ids_NK = teacher_logp_NV.topk(k, dim=-1).indices
        event_N = overlap_events(overlap_ratio(student_ids_NK, teacher_ids_NK), gate.k, gate.threshold)
        weight_N = apply_gate_packed(event_N, x.cu_seqlens, gate).weight_BT
        teacher_at_NK = teacher_logp_NV.gather(1, student_ids_NK)
        del teacher_logp_NV
    student_at_NK = student_logp_NV.gather(1, student_ids_NK)
    del student_logp_NV  # autograd has it
    fixed_NK = student_at_NK.detach()
    reward_NK = -weight_N[:, None] * fixed_NK.softmax(dim=-1) * (fixed_NK - teacher_at_NK)
    loss_sum = -(reward_NK * student_at_NK).sum()
    loss_sum.backward()
    return loss_sum.detach() / len(x.sampled_ids_N)


@torch.no_grad()
def floor(x: Inputs) -> Tensor | None:
    """Both models' logits and the student's two gradients, of logits that stand for their own gradient."""
    student_logits_CV = x.student_weight_VH.new_empty(x.chunk, len(x.student_weight_VH), dtype=torch.float32)
    teacher_logits_CV = x.teacher_weight_VH.new_empty(x.chunk, len(x.teacher_weight_VH), dtype=torch.float32)
    grad_hidden_NH, grad_weight_VH = torch.empty_like(x.student_hidden_NH), _buffer(x)
    assert grad_weight_VH is not None
    for begin in range(0, len(x.sampled_ids_N), x.chunk):
        part = slice(begin, begin + x.chunk)
        student_hidden_CH, teacher_hidden_CH = x.student_hidden_NH[part], x.teacher_hidden_NH[part]
        logits_CV = logits_(student_hidden_CH, x.student_weight_VH, student_logits_CV[: len(student_hidden_CH)])
        logits_(teacher_hidden_CH, x.teacher_weight_VH, teacher_logits_CV[: len(teacher_hidden_CH)])
        hidden_gradient_(logits_CV, x.student_weight_VH, grad_hidden_NH[part], torch.float32)
        add_weight_gradient_(grad_weight_VH, logits_CV, student_hidden_CH, torch.float32)
    x.student_hidden_NH.grad = grad_hidden_NH
    return None


CONTENDERS: dict[str, Callable[[Inputs], Tensor | None]] = {
    "ours": ours,
    "ours_no_metrics": ours_no_metrics,
    "ours_no_buffer": ours,
    "naive": naive,
    "ours_full": ours_full,
    "trl": rivals.trl,
    "liger": rivals.liger,
    "nemo_rl": rivals.nemo_rl,
    "floor": floor,
}


# ---------------------------------------------------------------------------------------------------- inputs


def make_inputs(
    tokens: int, vocab: int, sizes: Sequence[int], chunk: int, dtype: torch.dtype = torch.float32
) -> Inputs:
    """A student that sees a part of what its teacher sees: both models' top-k share some ids, as in training."""
    (student_size, teacher_size), random = sizes, torch.Generator().manual_seed(0)
    teacher_hidden_NH = torch.randn(tokens, teacher_size, generator=random)
    teacher_weight_VH = torch.randn(vocab, teacher_size, generator=random).mul_(2 * teacher_size**-0.5)
    teacher_hidden_NH[:, student_size:] /= 4
    student_hidden_NH = teacher_hidden_NH[:, :student_size].clone()
    student_weight_VH = teacher_weight_VH[:, :student_size].clone()
    sampled_ids_N = torch.randint(vocab, (tokens,), generator=random)
    cu_seqlens = [tokens * response // RESPONSES for response in range(RESPONSES + 1)]
    # fmt: off
    return Inputs(
        student_hidden_NH.to(dtype).requires_grad_(), student_weight_VH.to(dtype).requires_grad_(),
        teacher_hidden_NH.to(dtype), teacher_weight_VH.to(dtype), sampled_ids_N, cu_seqlens, chunk,
    )
    # fmt: on


# ---------------------------------------------------------------------------------------------------- measuring


def measure(
    contender: str, tokens: int, vocab: int, sizes: Sequence[int], chunk: int, threads: int, repeats: int, dtype: str
) -> dict[str, object]:
    """Memory of one call, time of `repeats` more, and what they computed.

    sizes: hidden, of student and teacher. dtype: of weights and hidden states, "fp32" or "bf16".
    """
    Path("/proc/self/oom_score_adj").write_text("1000")  # should memory run out, this process is the one that goes
    torch.set_num_threads(threads)
    inputs = make_inputs(tokens, vocab, sizes, chunk, DTYPES[dtype])
    run, buffered = CONTENDERS[contender], contender != "ours_no_buffer"
    toy = make_inputs(2 * RESPONSES, 64, sizes, RESPONSES, DTYPES[dtype])
    _forget_gradients(toy, buffered)
    run(toy)

    _forget_gradients(inputs, buffered)
    before = reset_peak()
    loss = run(inputs)
    extra = peak_memory() - before
    gradients = [inputs.student_hidden_NH.grad, _buffer(inputs)]
    norms = [gradient.norm().item() for gradient in gradients if gradient is not None]

    wall, cpu = [], []
    for _ in range(repeats):
        _forget_gradients(inputs, buffered)
        wall_start, cpu_start = time.perf_counter(), cpu_time()
        run(inputs)
        wall.append(time.perf_counter() - wall_start)
        cpu.append(cpu_time() - cpu_start)
    return {
        "extra_bytes": extra,
        "wall_s": wall,
        "cpu_s": cpu,
        "loss": None if loss is None else loss.item(),
        "grad_norms": None if loss is None else norms,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _buffer(x: Inputs) -> Tensor | None:
    """The weight's gradient, fp32: `.grad`, or of a bf16 weight `main_grad`, as megatron-core has it."""
    return getattr(x.student_weight_VH, "main_grad", x.student_weight_VH.grad)


def _forget_gradients(inputs: Inputs, buffered: bool) -> None:
    """No gradient of the hidden states; the weight's buffer, if it has one, in memory and at zero."""
    inputs.student_hidden_NH.grad = None
    weight_VH = inputs.student_weight_VH
    if not buffered:
        weight_VH.grad = None
        return
    buffer_VH = _buffer(inputs)
    if buffer_VH is None:
        buffer_VH = torch.empty_like(weight_VH, dtype=torch.float32)  # torch.zeros would leave pages to the first write
    buffer_VH.zero_()
    if weight_VH.dtype == torch.float32:
        weight_VH.grad = buffer_VH
    else:
        weight_VH.main_grad = buffer_VH  # type: ignore[attr-defined]


if __name__ == "__main__":
    answer(measure)
