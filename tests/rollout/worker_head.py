"""The process of test_head.py: a bf16 engine with rollout.head_dtype=fp32 beside the trainer's bf16 model.

    python worker_head.py MODELS OUT

Writes OUT/head.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from prune_opd import platform
from prune_opd.config import ParallelConfig, RolloutConfig
from prune_opd.rollout.request import TokenSampling, new_rows
from tests.rollout.worker_engine import make_prompts

MAX_TOKENS = 24


def head_of(worker: Any) -> dict[str, Any]:
    """The engine's own logits of made-up hidden states against float64 of the same numbers, relative to the largest."""
    model: Any = worker.model_runner.get_model()
    weight_VH = model.lm_head.weight.double()
    hidden_NH = torch.randn(50, weight_VH.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    logits_NV = model.compute_logits(hidden_NH)
    exact_NV = hidden_NH.double() @ weight_VH.t()[:, : logits_NV.shape[1]]
    return {
        "weight": str(model.lm_head.weight.dtype),
        "logits": str(logits_NV.dtype),
        "error": ((logits_NV.double() - exact_NV).abs().max() / exact_NV.abs().max()).item(),
    }


def round_head(worker: Any) -> None:
    """From here on the head's product is in bf16, as it is without the setting."""
    worker.model_runner.get_model().logits_processor.head_dtype = torch.bfloat16


def main(models: Path, out: Path) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.logprobs import sampled_logprobs
    from prune_opd.megatron.model import build
    from prune_opd.rollout.engine import RolloutEngine
    from prune_opd.weights.stream import Resharder

    layout = layouts.initialize(ParallelConfig(), machine, seed=0)
    rollout = RolloutConfig(max_prompt_len=256, max_num_seqs=8, head_dtype="fp32")
    engine = RolloutEngine(str(models / "student"), rollout, 64, torch.bfloat16, machine)
    student = build(models / "teacher", layout.student, torch.bfloat16, trainable=False)

    def difference() -> float:
        """Mean difference of the sampled tokens' log-probabilities from the trainer's [nats]."""
        rows = new_rows(make_prompts(), 4, MAX_TOKENS)
        rollouts = engine.generate(rows, TokenSampling(seed=3, step=1, logprobs=True))
        theirs = [logprob for response in rollouts.responses for logprob in response.logprobs or ()]
        ours = sampled_logprobs(student, rollouts, layout, machine.device)
        return sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(theirs)

    engine.load(Resharder(student, in_order=True).stream())
    results: dict[str, Any] = {"fp32": {**engine.llm.collective_rpc(head_of)[0], "difference": difference()}}
    engine.llm.collective_rpc(round_head)
    results["rounded"] = {**engine.llm.collective_rpc(head_of)[0], "difference": difference()}
    (out / "head.json").write_text(json.dumps(results))
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
