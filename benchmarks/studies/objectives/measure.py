"""One objective in the fused loss on this rank's shard of the vocabulary: memory of one call, CPU time of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import answer, cpu_time, peak_memory, reset_peak
from benchmarks.loss.measure import make_inputs
from benchmarks.loss.rivals import Inputs
from prune_opd.config import GateConfig, ObjectiveConfig
from prune_opd.loss import Head, Method, Tokens, distill_loss


def measure(objective: dict[str, Any], tokens: int, vocab: int, sizes: Sequence[int], chunk: int) -> dict[str, float]:
    """sizes: hidden, of student and teacher. The weight's gradient goes to a buffer, as in training."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    config, group = ObjectiveConfig(**objective), dist.group.WORLD if ranks > 1 else None

    def loss(x: Inputs) -> None:
        distill_loss(
            Head(x.student_hidden_NH, x.student_weight_VH),
            Head(x.teacher_hidden_NH, x.teacher_weight_VH),
            Tokens(x.sampled_ids_N, x.cu_seqlens, vocab_size=ranks * len(x.student_weight_VH)),
            Method(GateConfig(), config),
            tp_group=group,
            chunk=x.chunk,
            weight_grad=x.student_weight_VH.grad,
        )[0].backward()

    def shard(tokens: int, vocab: int, chunk: int) -> Inputs:
        # Each rank draws its own rows; hidden states are the same on all, since they are drawn first.
        inputs = make_inputs(tokens, vocab // ranks, sizes, chunk)
        if rank:
            inputs.teacher_weight_VH.add_(torch.randn(1, generator=torch.Generator().manual_seed(rank)))
        inputs.student_weight_VH.grad = torch.empty_like(inputs.student_weight_VH).zero_()
        return inputs

    loss(shard(8, 64 * ranks, 4))
    inputs = shard(tokens, vocab, chunk)
    before = reset_peak()
    loss(inputs)
    extra = peak_memory() - before
    start = cpu_time()
    loss(inputs)
    spent = cpu_time() - start
    dist.barrier()
    dist.destroy_process_group()
    return {"extra_bytes": extra, "cpu_s": spent}


if __name__ == "__main__":
    answer(measure)
