"""Ranks of test_plan_memory.py: what the parts of a real run take in several layouts, beside what the planner says.

    torchrun … worker_plan_memory.py MODELS OUT

Writes OUT/bytes.json from rank 0: by case and part, the bytes of the fullest rank and the planner's.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prune_opd import platform
from prune_opd.config import OptimizerConfig, ParallelConfig, PrecisionConfig, TrainConfig
from prune_opd.recipe import load_recipe

CASES: dict[str, dict[str, Any]] = {
    "qwen2 TP2+SP": {"tensor": 2, "sequence_parallel": True},
    "qwen2 PP2": {"tensor": 1, "pipeline": 2},
    "qwen2 DP2": {"tensor": 1},
    "qwen2 DP2+dist-opt": {"tensor": 1, "distributed_optimizer": True},
    "qwen3_moe EP2+dist-opt": {"tensor": 1, "expert": 2, "teacher_expert": 2, "distributed_optimizer": True},
    "qwen3_moe TP2+SP EP2": {"tensor": 2, "sequence_parallel": True, "expert": 2},
}


def measured(models: Path, config: TrainConfig, layout: Any) -> dict[str, int]:
    """Bytes of this rank's parts after a step, when Adam has its moments."""
    from prune_opd.megatron.offload import optimizer_tensors
    from prune_opd.megatron.packing import pack
    from prune_opd.megatron.teacher import Teacher
    from prune_opd.megatron.trainer import Trainer

    cpu = torch.device("cpu")
    trainer = Trainer(config.student, OptimizerConfig(lr=1e-4), config.parallel, 1, layout, torch.bfloat16, cpu)
    teacher = Teacher(config.teacher, layout, torch.bfloat16, cpu, 1000)
    ids = [(1, 2, 3, 4)] * 2
    batches = pack(ids, ids, [layout.student.dp_rank], 1000, cpu, trainer.chunks[0].token_multiple)
    trainer.step(batches, lambda model, batch, hidden_NH: (hidden_NH.float().square().sum(), len(batch.ids_N)))
    student = list(numbers(p for chunk in trainer.chunks for p in chunk.parameters()))
    optimizer = list(numbers(optimizer_tensors(trainer.optimizer)))
    buffers = [*trainer.ddp[0].buffers, *trainer.ddp[0].expert_parallel_buffers]
    return {
        "student": sum(student),
        "gradients": sum(numbers(buffer.grad_data for buffer in buffers)),
        "optimizer": sum(optimizer),
        "teacher": sum(numbers(p for chunk in teacher.chunks for p in chunk.parameters())),
        "teacher_head": sum(numbers([teacher.head_weight])) if layout.student.is_last_stage else 0,
    }


def numbers(tensors: Any) -> Any:
    return (tensor.numel() * tensor.element_size() for tensor in tensors)


def main(models: Path, out: Path) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts
    from prune_opd.plan.memory import part_bytes
    from prune_opd.plan.setting import setting_of

    world = layouts.initialize(ParallelConfig(tensor=1), machine, seed=0).world
    base = load_recipe("tiny_compatible")
    assert isinstance(base, TrainConfig)
    found = {}
    for case, settings in CASES.items():
        model = str(models / case.partition(" ")[0])
        config = dataclasses.replace(
            base,
            student=model,
            teacher=model,
            parallel=ParallelConfig(nproc=world, **settings),
            precision=PrecisionConfig(params="bf16"),
        )
        mine = measured(models, config, layouts.arrange(config.parallel, seed=0))
        gc.collect()
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, mine)
        planned = part_bytes(setting_of(config, "h100", 1))
        found[case] = {part: [max(rank[part] for rank in everyone), planned[part]] for part in mine}
    if dist.get_rank() == 0:
        (out / "bytes.json").write_text(json.dumps(found))
    dist.barrier()
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
