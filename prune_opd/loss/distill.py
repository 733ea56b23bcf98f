"""The loss: gated on-policy distillation from hidden states, in chunks of tokens (Prune-OPD, method.md §1 and §2).

One pass over the packed response tokens, in order: `distill_loss` is the loop over its chunks. loss/chunk.py has what
happens to a chunk of n tokens on every rank of the tensor-parallel group, method/gate.py the gate, from top-k ids to
weights, and method/objective.py the objectives:

    student hidden ─ @ student weight shard ─▶ logits [n, V/tp] ─┬─▶ top-k ids ──┐
    teacher hidden ─ @ teacher weight shard ─▶ logits [n, V/tp] ─┼─▶ top-k ids ──┤  one all-gather
                                                                 │               ├─▶ overlap O ─▶ event B
                                                                 │    candidates ┘             │
                   log p_j, log q_j on candidates, log p(y) ◀────┘  one all-reduce             ▼
                                  │                                  (with Σ exp)   PackedGate: C ─▶ R ─▶ weight W
                                  ▼                                                            │
                  objective: loss ℓ and c_j = ∂ℓ/∂log p_j ◀────────────────────────────────────┘
                                  │
                                  ▼
                  ∂ℓ/∂logit_v = (c_v − p_v Σ_j c_j) / temperature      written over the student's logits
                                  ├─ @ student weight shard ─▶ hidden gradient    (all-reduced once, at the end)
                                  └─ᵀ@ student hidden ───────▶ weight gradient    (summed over the chunks)

The gate is a running count, so nothing of a later chunk is needed for an earlier one, and the gradient is formed while
the logits are there: no matrix product is computed twice and nothing of size tokens × vocabulary outlives its chunk.
What needs a whole response first (`weight_normalisation = mean`, iw_opd, tip, a discount) takes a pass before for that
alone, and so does a gate over context-parallel ranks, each of which has a part of every response (loss/context.py).

An objective on the whole vocabulary has every column of a rank as its candidates. The normalisers' pass also sums what
tells whether a run is well, whatever the objective (loss/vocab_sums.py): the exact reverse KL and both entropies. A KL
on the whole vocabulary has its value from there; the sums of another are all-reduced once more. Where both models'
vocabularies are padded differently, the teacher's weight is first exchanged so that a rank holds the same ids of both
(`OutputHead.align`). loss/passes.py has all that goes through whole matrices of logits, by torch's kernels or our own.

A caller that keeps a gradient buffer of the output weight (megatron's `main_grad`) has the weight gradient added to it
right there (`weight_grad`), so that the loss holds nothing of the size of a weight.

A task's reward (`Tokens.advantage_N`) adds the policy gradient of the sampled tokens, as one more candidate a token:
its log-probability is there already.

When a batch serves several updates, a call with policy "keep" before the first leaves in its statistics what is then
fixed (`OldPolicy`), and calls with that policy evaluate the moved student against it.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.loss.chunk import Gradients, WithGradients, add_reward, chunk_loss, score_chunk
from prune_opd.loss.inputs import Head, Method, Tokens, check_buffer, check_kernels, check_options, checked_offsets
from prune_opd.loss.known_top import KnownTop, KnownTopHead
from prune_opd.loss.old_policy import OldPolicy
from prune_opd.loss.stats import GateStats, TokenRecord
from prune_opd.loss.token_weights import TokenWeights
from prune_opd.loss.vocab_parallel import BothLogits, OutputHead
from prune_opd.method.objective import on_vocabulary


def distill_loss(
    student: Head,
    teacher: Head | KnownTop,
    tokens: Tokens,
    method: Method,
    *,
    tp_group: dist.ProcessGroup | None = None,
    chunk: int = 1024,
    weight_grad: Tensor | None = None,
    policy: OldPolicy | Literal["keep"] | None = None,
) -> tuple[Tensor, int, GateStats]:
    """Σ_t ℓ_t over N packed response tokens, how many they are, and what the gate saw.

    The sum is left undivided: the loss is ONE token mean over the global batch, so the caller divides by the global
    token count. Differentiable in student.hidden_NH, whose gradient is whole on every rank of tp_group, and in
    student.weight_VH; the teacher gets no gradient.

    teacher: its head, or what is known of its best ids (loss/known_top.py); the statistics that need more are NaN then.
    tp_group: the ranks that share the vocabulary; None where this rank has all of it.
    chunk: tokens whose logits are alive at a time.
    weight_grad: buffer [V/tp, H], fp32 or of the weight's dtype, that the weight's gradient of loss_sum is added to
        while it is formed; student.weight_VH then gets none through autograd. It is there when this returns, so
        loss_sum must be back-propagated once, as it is: a backward that brings another upstream gradient than 1, or
        comes a second time, raises. What cannot be seen from here is left to the caller: a call whose loss is never
        back-propagated has been added all the same (without gradients, torch.no_grad(), nothing is), and after any
        error the buffer is spoilt.
    policy: for several updates with the same tokens. "keep", before the first: leave in stats.policy what then stays
        fixed. That policy, when updates have been made since: hold the moved student against it; the statistics are
        then the moved student's, but for weight_N.

    Returns (loss_sum, token_count, stats): loss_sum fp32 (fp64 for fp64 inputs) and token_count = N. Logits are taken
    to fp32 before any statistic, whatever the inputs' dtype. ConfigError for a setting, ValueError for a tensor that
    does not fit, both before anything is computed; after it `NotFiniteLogitsError`, a ValueError, for hidden states
    whose logits are not finite, and ValueError for sampled ids outside the vocabulary.
    """
    student_head = OutputHead("student", *student, method.objective.temperature, tokens.vocab_size, tp_group)
    if isinstance(teacher, KnownTop):
        ids_N, rows = tokens.sampled_ids_N, student_head.shard.rows
        teacher_head: OutputHead = KnownTopHead(teacher, ids_N, rows, tokens.vocab_size, tp_group)
    else:
        teacher_head = OutputHead("teacher", *teacher, method.objective.of_teacher, tokens.vocab_size, tp_group)
    check_options(chunk, policy)
    check_kernels(method.objective.kernels, student.hidden_NH.device)
    offsets = checked_offsets(student_head, teacher_head, tokens, method)
    if weight_grad is not None:
        check_buffer(weight_grad, student.weight_VH)
    want_hidden, want_weight = (torch.is_grad_enabled() and tensor.requires_grad for tensor in student)
    old = policy if isinstance(policy, OldPolicy) else None

    with torch.no_grad():
        both = _allocate(student_head, teacher_head, method, chunk)
        dtype = both.dtype
        weights = TokenWeights(tokens, offsets, method, dtype)
        record = TokenRecord(tokens, dtype, keep=policy == "keep")
        gradients = Gradients(student_head, want_hidden, want_weight, weight_grad)
        parts = _parts(len(tokens.sampled_ids_N), chunk)
        ids_N = tokens.sampled_ids_N.clamp(0, tokens.vocab_size - 1)  # those outside are named by `stats`
        if weights.needs_ahead(weighted=old is not None):
            weights.look_ahead(score_chunk(both, ids_N, part, method) for part in parts)
        for part in parts:
            old_part = None if old is None else old.part(part)
            scores = weights.judge(part, score_chunk(both, ids_N, part, method, old=old_part))
            chunk_weights = plain = weights.next(part, scores) if old_part is None else old_part.weights
            if old_part is None:
                chunk_weights = weights.corrected(part, scores, plain)
            loss = chunk_loss(scores, method.objectives, chunk_weights, old_part, weights.credit(part, scores))
            advantage_N = weights.advantage(part, scores) if old_part is None else old_part.advantage_N
            if advantage_N is not None:
                sampled_N = None if old_part is None else old_part.sampled_logp_N
                scores, loss = add_reward(scores, loss, method.objective, advantage_N, sampled_N)
            record.add(scores, chunk_weights, loss, plain[0], advantage_N)
            gradients.add(part, scores, loss)
        stats = record.stats(offsets, method, teacher_head.whole)
        loss_sum = record.loss_sum()
        grad_hidden_NH, grad_weight_VH = gradients.finish()

    if want_hidden or want_weight:
        loss_sum = WithGradients.apply(*student, loss_sum, grad_hidden_NH, grad_weight_VH, weight_grad is not None)
    return loss_sum, len(tokens.sampled_ids_N), stats


def _parts(tokens: int, chunk: int) -> list[slice]:
    """The chunks. No tokens are one empty chunk: it has the right shapes, and takes part in what ranks exchange."""
    return [slice(begin, min(begin + chunk, tokens)) for begin in range(0, tokens, chunk)] or [slice(0, 0)]


def _allocate(student: OutputHead, teacher: OutputHead, method: Method, chunk: int) -> BothLogits:
    """The buffer for a chunk's logits, at least fp32."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    if on_vocabulary(method.objective) or method.needs_reverse_kl:
        teacher.align(student.shard.rows)
    scratch = method.objective.kernels == "torch"
    return BothLogits(student, teacher, min(chunk, len(student.hidden_NH)), dtype, scratch)
