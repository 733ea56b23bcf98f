"""Ranks of test_mismatch_alarm.py: a whole run whose engines get other weights than the student's after a good start.

    torchrun … worker_mismatch.py MODELS OUT QUANTIZATION

Two data-parallel ranks, an engine each, in fp32. With a QUANTIZATION (not none) the engines differ from a bf16 trainer
anyway, and the tokens are corrected. Rank 0 writes OUT/results.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ObjectiveConfig,
    PrecisionConfig,
    RolloutConfig,
    SurvivalConfig,
    TrackConfig,
)
from prune_opd.errors import UserError
from tests.distributed.tiny_run import train_config

NamedTensors = Iterable[tuple[str, Tensor]]
LAYER = ".layers.1."


class Spoiler:
    """Stands between the stream of weights and one rank's engine."""

    def __init__(self, run: Any, rank: int) -> None:
        self.engine, self.mine = run.rollout.engine, run.layout.rank == rank
        self.load = self.engine.load
        self.old: dict[str, Tensor] = {}
        self.change: Callable[[str, Tensor], Tensor] | None = None
        self.engine.load = lambda weights: self.load(self.spoilt(weights))

    def spoilt(self, weights: NamedTensors) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if self.mine and LAYER in name:
                if self.change is None:
                    self.old[name] = tensor.clone()
                else:
                    tensor = self.change(name, tensor)
            yield name, tensor


def main(models: Path, out: Path, quantization: str) -> None:
    coarse = None if quantization == "none" else quantization
    config = train_config(
        models,
        1,
        objective=ObjectiveConfig("sampled_token", mismatch="masked" if coarse else "none"),
        data=DataConfig(min_steps=2, max_steps=4),
        rollout=RolloutConfig(prompts=4, responses=2, max_prompt_len=64, quantization=coarse, kv_cache_gb=0.05),
        precision=PrecisionConfig(params="bf16" if coarse else "fp32"),
        evaluation=EvalConfig(problems=0),
        checkpoint=CheckpointConfig(every=0, last=False, export_hf=False),
        track=TrackConfig(wandb="disabled", report=False, samples=0),
        survival=SurvivalConfig(max_mismatch=0.0, teacher_test=0),
        optimizer=dataclasses.replace(train_config(models, 1).optimizer, lr=1e-3),
    )
    from prune_opd import platform

    platform.prepare()
    from prune_opd.loop import step
    from prune_opd.run import prepare

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        run = prepare(config, out / "run", "never")
        spoiler = Spoiler(run, rank=1)
        for _ in range(2):
            step(run)
        error = ""
        if not coarse:
            spoiler.change = lambda name, tensor: spoiler.old[name]
            step(run)  # 3: a layer of step 1 in engine 1
            spoiler.change = None
            step(run)  # 4: well again
            spoiler.change = lambda name, tensor: tensor * (1 + 0.5 * torch.randn_like(tensor))
            run.config = dataclasses.replace(config, survival=SurvivalConfig())
            try:
                step(run)  # 5: a broken one
            except UserError as reason:
                error = str(reason)
    errors: list[Any] = [None] * run.layout.world
    dist.all_gather_object(errors, error)
    run.tracker.close()
    if run.layout.is_main:
        (out / "results.json").write_text(json.dumps({"errors": errors, "said": said.getvalue()}))
    run.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
