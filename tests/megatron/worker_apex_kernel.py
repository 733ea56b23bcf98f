"""A rank of test_fusions.py: one step with apex's kernel, one without.

    worker_apex_kernel.py MODELS OUT

The kernel is a stand-in for the CPU: the same name and arguments, and torch's product added to the fp32 buffer. OUT
gets how often it was called, and how far the gradients of both are apart: tied and own output matrices, fp32 and bf16.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from prune_opd import platform
from prune_opd.config import ParallelConfig, PrecisionConfig
from tests.distributed.tiny_run import build_run, made_up_rollouts, train_config, train_step


class Kernel:
    """In place of fused_weight_gradient_mlp_cuda."""

    def __init__(self) -> None:
        self.calls = 0

    def wgrad_gemm_accum_fp32(self, total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        assert main_grad.dtype == torch.float32
        self.calls += 1
        main_grad += grad_output.float().t() @ total_input.float()


def gradients(models: Path, out: Path, layout: Any, params: str, fused: bool) -> tuple[dict[str, Tensor], int]:
    """main_grad of every parameter after one step, and how often the kernel was called."""
    from megatron.core.tensor_parallel import layers

    from prune_opd.megatron import model

    kernel = Kernel()
    config = train_config(models, 1, precision=PrecisionConfig(params=params))  # type: ignore[arg-type]
    config = replace(config, optimizer=replace(config.optimizer, clip_grad=0.0))
    with (
        mock.patch.object(model, "gradient_fusion", lambda on_gpu: {"gradient_accumulation_fusion": fused}),
        mock.patch.object(layers, "_grad_accum_fusion_available", True),
        mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", kernel, create=True),
    ):
        run = build_run(config, layout, out)
        train_step(run, made_up_rollouts())
    (chunk,) = run.trainer.chunks
    return {name: parameter.main_grad.clone() for name, parameter in chunk.named_parameters()}, kernel.calls


def main(models: Path, out: Path) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts

    layout = layouts.initialize(ParallelConfig(tensor=1), machine, seed=0)
    found = {}
    for kind in ("tied", "own"):
        for params in ("fp32", "bf16"):
            (plain, without), (fused, calls) = (
                gradients(models / kind, out, layout, params, fused) for fused in (False, True)
            )
            apart = {name: float((fused[name] - plain[name]).norm() / plain[name].norm()) for name in plain}
            found[f"{kind} {params}"] = {"calls": [without, calls], "apart": apart}
    (out / "results.json").write_text(json.dumps(found))
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
