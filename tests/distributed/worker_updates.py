"""Ranks of test_updates_per_batch.py: two training steps of several updates each, by objective.

    torchrun … worker_updates.py MODELS OUT TP

Writes OUT/rank<r>.json, {case: record of the last step}, and OUT/<case>.rank<r>.safetensors, the parameters after it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file

from prune_opd import platform
from prune_opd.config import ObjectiveConfig, OptimizerConfig, ParallelConfig
from tests.distributed.tiny_run import OPTIMIZER, build_run, made_up_rollouts, train_config, train_step
from tests.distributed.tiny_run import whole_parameters as parameters

CASES = {"topk_reverse_kl": ObjectiveConfig(k=8), "full_vocab_jsd": ObjectiveConfig("full_vocab_jsd", k=8)}
STEPS = 2


def several_updates(run: Any) -> dict[str, Any]:
    """The loop's own step, once the rollouts are there, with what each update saw of the ratio."""
    from prune_opd.loop import train_on
    from prune_opd.loss.stats import BatchStats
    from prune_opd.track.clock import PhaseClock

    seen: list[Any] = []
    add_ratio = BatchStats.add_ratio

    def noting(stats: BatchStats, ratios: Any) -> None:
        add_ratio(stats, ratios)
        seen.append(ratios.ratio_N)

    BatchStats.add_ratio = noting
    try:
        batch = run.train_batch(made_up_rollouts())
        result, stats = train_on(run, batch, PhaseClock(run.machine, run.phases.enter))
    finally:
        BatchStats.add_ratio = add_ratio
    by_update = [(ratio_N - 1).abs().max().item() for ratio_N in seen if ratio_N is not None]
    return {**stats.record(), **dataclasses.asdict(result), "by_update": by_update}


def main(models: Path, out: Path, tensor_parallel: int) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts

    parallel = ParallelConfig(tensor=tensor_parallel)
    layout = layouts.initialize(parallel, machine, seed=0)

    def new_run(objective: ObjectiveConfig, optimizer: OptimizerConfig) -> Any:
        config = train_config(models, tensor_parallel, parallel=parallel, objective=objective, optimizer=optimizer)
        return build_run(config, layout, out)

    records: dict[str, Any] = {}
    for case, objective in CASES.items():
        run = new_run(objective, dataclasses.replace(OPTIMIZER, updates_per_batch=3, schedule="linear"))
        records[case] = [several_updates(run) for _ in range(STEPS)]
        save_file(parameters(run.trainer.chunks), out / f"{case}.rank{layout.rank}.safetensors")
    for case, step in (("one", several_updates), ("plain", lambda run: train_step(run, made_up_rollouts()))):
        run = new_run(CASES["topk_reverse_kl"], OPTIMIZER)
        records[case] = [step(run)]
        save_file(parameters(run.trainer.chunks), out / f"{case}.rank{layout.rank}.safetensors")
    (out / f"rank{layout.rank}.json").write_text(json.dumps(records))
    dist.barrier()
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
