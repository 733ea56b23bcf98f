"""Ranks of test_memory_moves.py: the real student, optimizer and teacher, with their storages moved between phases.

    torchrun … worker_memory.py MODELS OUT

On the CPU "away" is another piece of the same memory; everything else about a move is as on a GPU: bytes copied out,
storages emptied and filled again under the tensors that DDP, optimizer and model hold. Rank 0 writes OUT/rank0.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_opd import platform
from prune_opd.config import MemoryConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from tests.distributed.tiny_run import build_run, made_up_rollouts, train_config, whole_parameters

EVERYTHING = MemoryConfig(offload_student=True, offload_gradients=True, offload_optimizer=True, offload_teacher=True)
STEPS = 3
TINY_LR, TINY_UPDATES = 1e-6, 64
AWAY_FROM_ZERO = 1e-3  # bf16 keeps 8 bits: half a step of a weight this large is 3.8e-6


def make_run(models: Path, layout: Any, out: Path, params: str, distributed: bool) -> Any:
    """A run whose optimizer is sharded over the data-parallel ranks, or not."""
    parallel = ParallelConfig(tensor=1, distributed_optimizer=distributed)
    config = train_config(models, tensor=1, parallel=parallel, precision=PrecisionConfig(params=params))
    return build_run(config, layout, out)


def train(run: Any, memory: MemoryConfig) -> dict[str, Any]:
    """Three steps with what a step does, and what was on the device when the rollout would have begun."""
    from prune_opd.config.memory_phases import MemoryPhases
    from prune_opd.loop import train_on
    from prune_opd.megatron.offload import handlers, optimizer_tensors
    from prune_opd.track.clock import PhaseClock

    run.phases.memory = MemoryPhases(memory, handlers(run.trainer, run.teacher, lambda: None, run.machine))
    results, left = [], {}
    for number in range(STEPS):
        run.phases.enter("sync")
        run.phases.enter("rollout")
        gradients = [buffer.grad_data for chunk in run.trainer.ddp for buffer in chunk.buffers]
        left = {
            "student": bytes_of(p for chunk in run.trainer.chunks for p in chunk.parameters()),
            "gradients": bytes_of(gradients),
            "optimizer": bytes_of(optimizer_tensors(run.trainer.optimizer)),
            "teacher": bytes_of(p for chunk in run.teacher.chunks for p in chunk.parameters()),
        }
        batch = run.train_batch(made_up_rollouts(seed=number))
        result, _ = train_on(run, batch, PhaseClock(run.machine, run.phases.enter))
        results.append([result.loss, result.grad_norm])
    run.phases.enter("export")
    return {"results": results, "left": left, "weights": whole_parameters(run.trainer.chunks)}


def bytes_of(tensors: Any) -> int:
    storages = {storage._cdata: storage.nbytes() for t in tensors for storage in [t.untyped_storage()]}
    return sum(storages.values())


def compare(models: Path, layout: Any, out: Path, params: str, distributed: bool) -> dict[str, Any]:
    stay = train(make_run(models, layout, out, params, distributed), MemoryConfig())
    move = train(make_run(models, layout, out, params, distributed), EVERYTHING)
    same = all(torch.equal(stay["weights"][name], weight) for name, weight in move["weights"].items())
    return {
        "stay": stay["results"],
        "move": move["results"],
        "same weights": same and stay["weights"].keys() == move["weights"].keys(),
        "left if it stays": stay["left"],
        "left if it moves": move["left"],
    }


def tiny_updates(models: Path, layout: Any) -> dict[str, float]:
    """Updates that bf16 rounds away: by megatron's optimizer, and by Adam on the bf16 weights themselves."""
    from prune_opd.megatron.packing import pack
    from prune_opd.megatron.trainer import Trainer

    optimizer = OptimizerConfig(lr=TINY_LR, weight_decay=0.0)
    parallel, cpu = ParallelConfig(tensor=1), torch.device("cpu")
    trainer = Trainer(models / "student", optimizer, parallel, TINY_UPDATES, layout, torch.bfloat16, cpu)
    parameters = list(trainer.chunks[0].parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    rollouts = made_up_rollouts()
    batches = pack(rollouts.prompt_ids, rollouts.response_ids, range(4), 1000, cpu)
    alone = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    adam = torch.optim.AdamW(alone, lr=TINY_LR, weight_decay=0.0)
    for _ in range(TINY_UPDATES):
        trainer.step(batches, lambda model, batch, hidden_NH: (hidden_NH.float().square().sum(), len(batch.ids_N)))
        for mine, parameter in zip(alone, parameters, strict=True):
            mine.grad = parameter.main_grad.to(torch.bfloat16)  # what megatron's optimizer has just used
        adam.step()
    large = [tensor.abs() >= AWAY_FROM_ZERO for tensor in start]

    def changed(after: list[Any]) -> float:
        pairs = zip(after, start, large, strict=True)
        return sum(int((new.detach() != old)[where].sum()) for new, old, where in pairs) / sum(
            int(where.sum()) for where in large
        )

    masters = {id(p): p.main_param for p in parameters}
    moved = [(masters[id(p)] - old.float()).abs() for p, old in zip(parameters, start, strict=True)]
    updated: Tensor = torch.cat([tensor.flatten() for tensor in moved])
    return {
        "changed alone": changed(alone),
        "changed with masters": changed(parameters),
        "median move of the masters": updated[updated > 0].median().item(),
        "masters are fp32": float(all(master.dtype == torch.float32 for master in masters.values())),
        "weights are the rounded masters": float(
            all(torch.equal(p.detach(), masters[id(p)].to(torch.bfloat16)) for p in parameters)
        ),
    }


def main(models: Path, out: Path) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts

    layout = layouts.initialize(ParallelConfig(tensor=1), machine, seed=0)
    results: dict[str, Any] = {
        f"{params}, distributed={distributed}": compare(models, layout, out, params, distributed)
        for params in ("fp32", "bf16")
        for distributed in (False, True)
    }
    results["tiny updates"] = tiny_updates(models, layout)
    if layout.is_main:
        (out / "rank0.json").write_text(json.dumps(results))
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
