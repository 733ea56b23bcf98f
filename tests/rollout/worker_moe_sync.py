"""A rank of test_moe_sync.py: a student with experts that goes through three weight syncs; then a broken second load.

torchrun … worker_moe_sync.py MODELS OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from prune_opd import platform
from prune_opd.config import ParallelConfig, RolloutConfig
from prune_opd.errors import UserError
from tests.distributed.tiny_run import build_run, train_config


def move(run: Any, seed: int) -> None:
    """Another student, as an update of all its weights would make it."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for chunk in run.trainer.chunks:
            for parameter in chunk.parameters():
                parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=draw))


def syncs(run: Any, steps: int) -> list[str]:
    """What each of the next syncs says, of a run that has just built its engine; empty where it passes."""
    from prune_opd.megatron.sync import WeightSync

    sync, said, compared = WeightSync(run.config, run.trainer, run.rollout, lambda phase: None), [], 0
    check = sync.check_parity

    def counted() -> None:
        nonlocal compared
        compared += 1
        check()

    sync.check_parity = counted  # type: ignore[method-assign]
    for step in range(steps):
        move(run, step)
        try:
            sync(step)
            said.append("")
        except UserError as error:
            said.append(str(error))
    assert compared == steps, "every sync is compared"
    return said


def main(models: Path, out: Path) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts
    from prune_opd.rollout.engine import RolloutEngine

    layout = layouts.initialize(ParallelConfig(), machine, seed=0)
    rollout = RolloutConfig(max_prompt_len=256, max_num_seqs=8, kv_cache_gb=0.01, parity_every=1)
    run = build_run(train_config(models, 1, rollout=rollout), layout, out)
    run.rollout.engine = RolloutEngine(run.config.student, rollout, 64, torch.float32, machine)
    results: dict[str, Any] = {"well": syncs(run, 3)}
    # Without this the engine's kernels keep the experts that they packed at the first load.
    unpack, platform._unpack_experts = platform._unpack_experts, lambda worker: None
    results["packed once"] = syncs(run, 2)
    platform._unpack_experts = unpack
    results["well again"] = syncs(run, 1)
    (out / "result.json").write_text(json.dumps(results))
    run.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
