"""Ranks of test_head_gradient.py: one step with the head's gradient put into megatron's buffer, and through autograd.

    torchrun … worker_head_gradient.py MODELS OUT TP

MODELS has folders `tied` and `untied`, each with a student and a teacher. Writes OUT/rank<r>.json, {case: record}, and
OUT/<case>.rank<r>.safetensors, the parameters after the step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from prune_opd import platform
from prune_opd.config import ParallelConfig
from prune_opd.loss import training_loss
from tests.distributed.tiny_run import build_run, look, made_up_rollouts, train_config, train_step, whole_parameters


def one_step(models: Path, layout: Any, buffered: bool) -> tuple[dict[str, Any], Any]:
    """A step of several micro-batches; the record says how often the loss was given the buffer."""
    parallel = ParallelConfig(tensor=layout.student.tp, microbatch_tokens=40, loss_chunk_tokens=7)
    run = build_run(train_config(models, layout.student.tp, parallel=parallel), layout, models)
    model, given, chunks = run.trainer.chunks[0], [], []
    head_weight, distill_loss = model.head_weight, training_loss.distill_loss

    def without_buffer() -> Tensor:
        weight_VH: Tensor = head_weight()
        return weight_VH.view_as(weight_VH)  # the same rows, and not the parameter that has `main_grad`

    def noting(*args: Any, **kwargs: Any) -> Any:
        buffer = kwargs["weight_grad"]
        given.append(buffer is not None)
        chunks.append(kwargs["chunk"])
        before = None if buffer is None else buffer.clone()
        result = distill_loss(*args, **kwargs)
        # Only a call that will have its backward may add to it.
        assert buffer is None or bool((buffer != before).any()) == result[0].requires_grad
        return result

    if not buffered:
        model.head_weight = without_buffer
    training_loss.distill_loss = noting
    try:
        look(run, made_up_rollouts())
        record = train_step(run, made_up_rollouts())
    finally:
        training_loss.distill_loss = distill_loss
    return {**record, "given": given, "chunks": chunks}, whole_parameters(run.trainer.chunks)


def main(models: Path, out: Path, tensor_parallel: int) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts

    layout = layouts.initialize(ParallelConfig(tensor=tensor_parallel), machine, seed=0)
    records: dict[str, Any] = {}
    for kind in ("tied", "untied"):
        for buffered in (True, False):
            name = f"{kind} {'buffer' if buffered else 'autograd'}"
            records[name], parameters = one_step(models / kind, layout, buffered)
            save_file(parameters, out / f"{name}.rank{layout.rank}.safetensors")
    (out / f"rank{layout.rank}.json").write_text(json.dumps(records))
    dist.barrier()
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
