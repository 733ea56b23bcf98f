"""Ranks of test_plan_memory.py: what the parts of a real run take in several layouts, beside what the planner says.

    torchrun … worker_plan_memory.py MODELS OUT

Writes OUT/bytes.json from rank 0: by case and part, the bytes of the fullest rank and the planner's; of activations,
the bytes of one token, averaged over the ranks, which share a layer's experts unevenly.
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
from prune_opd.config import LoraConfig, OptimizerConfig, ParallelConfig, PrecisionConfig, TrainConfig
from prune_opd.config.recipe import load_recipe

CASES: dict[str, dict[str, Any]] = {
    "qwen2 TP2+SP": {"tensor": 2, "sequence_parallel": True},
    "qwen2 PP2": {"tensor": 1, "pipeline": 2},
    "qwen2 DP2": {"tensor": 1},
    "qwen2 DP2 selective": {"tensor": 1, "recompute": "selective"},
    "qwen2 DP2 full": {"tensor": 1, "recompute": "full"},
    "qwen2 TP2+SP full": {"tensor": 2, "sequence_parallel": True, "recompute": "full"},
    "qwen2 DP2+dist-opt": {"tensor": 1, "distributed_optimizer": True},
    "qwen3_moe EP2+dist-opt": {"tensor": 1, "expert": 2, "teacher_expert": 2, "distributed_optimizer": True},
    "qwen3_moe TP2+SP EP2": {"tensor": 2, "sequence_parallel": True, "expert": 2},
    "qwen2 LoRA TP2+SP": {"tensor": 2, "sequence_parallel": True},
    "qwen2 LoRA TP2": {"tensor": 2},
    "qwen2 LoRA PP2": {"tensor": 1, "pipeline": 2},
    "qwen2 LoRA DP2+dist-opt": {"tensor": 1, "distributed_optimizer": True},
    "qwen2 LoRA DP2 full": {"tensor": 1, "recompute": "full"},
    "qwen2 LoRA of attention DP2": {"tensor": 1},
    "qwen2 LoRA of ends TP2+SP": {"tensor": 2, "sequence_parallel": True},
}
ATTENTION = LoraConfig(rank=8, targets=("linear_qkv", "linear_proj"))
ENDS = LoraConfig(rank=8, targets=("linear_qkv", "linear_fc2"))
ADAPTERS = {"LoRA of attention": ATTENTION, "LoRA of ends": ENDS}


def adapters_of(case: str) -> LoraConfig:
    """By what the case's name has."""
    named = next((lora for name, lora in ADAPTERS.items() if name in case), None)
    return named or LoraConfig(rank=8 if "LoRA" in case else 0)


def measured(config: TrainConfig, layout: Any) -> dict[str, float]:
    """Bytes of this rank's parts after a step, when Adam has its moments, and of a token's activations."""
    from prune_opd.megatron.offload import optimizer_tensors
    from prune_opd.megatron.packing import pack
    from prune_opd.megatron.teacher import Teacher
    from prune_opd.megatron.trainer import Trainer, Tuning

    cpu, tuning = torch.device("cpu"), Tuning(lora=config.lora)
    trainer = Trainer(config.student, OptimizerConfig(lr=1e-4), config.parallel, 1, layout, torch.bfloat16, cpu, tuning)
    teacher = Teacher(config.teacher, layout, torch.bfloat16, cpu, 1000)
    ids = [(1, 2, 3, 4)] * 2
    batches = pack(ids, ids, [layout.student.dp_rank], 1000, cpu, trainer.chunks[0].token_multiple)
    trainer.step(batches, lambda model, batch, hidden_NH: (hidden_NH.float().square().sum(), len(batch.ids_N)))
    longer = [tuple(range(1, 65))] * 2
    batch = pack(longer, longer, [layout.student.dp_rank], 1000, cpu, trainer.chunks[0].token_multiple)[0]
    student = list(numbers(p for chunk in trainer.chunks for p in chunk.parameters()))
    optimizer = list(numbers(optimizer_tensors(trainer.optimizer)))
    buffers = [*trainer.ddp[0].buffers, *trainer.ddp[0].expert_parallel_buffers]
    return {
        "student": sum(student),
        "gradients": sum(numbers(buffer.grad_data for buffer in buffers)),
        "optimizer": sum(optimizer),
        "teacher": sum(numbers(p for chunk in teacher.chunks for p in chunk.parameters())),
        "teacher_head": sum(numbers([teacher.head_weight])) if layout.student.is_last_stage else 0,
        "activations": saved(trainer.chunks[0], batch) if layout.student.pp == 1 else 0,
    }


def saved(model: Any, batch: Any) -> float:
    """Bytes of a token that the layers' backward passes will need, as autograd saves them, each storage once.

    In bf16 only: torch's norms keep fp32 copies of their inputs, which Transformer Engine's do not.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.Tensor] = {}  # the tensor keeps its storage, so that no other gets the same address

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if tensor.dtype == torch.bfloat16 and address not in weights:
            storages.setdefault(address, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(batch)
    del out
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values()) / len(batch.ids_N)


def planned_activations(config: TrainConfig, setting: Any) -> float:
    """The planner's bytes of a token, as far as `saved` sees them."""
    from prune_opd.plan.adapters import kept_change
    from prune_opd.plan.memory import kept_bytes

    spec, parallel = setting.student, config.parallel
    tensor, shared = parallel.tensor or 1, (parallel.tensor or 1) if parallel.sequence_parallel else 1
    kept = kept_bytes(spec, tensor, parallel.sequence_parallel, parallel.recompute)
    if parallel.recompute != "full":
        kept += kept_change(spec, config.lora, tensor, parallel.sequence_parallel)
        before_norm = 2 * spec.heads * spec.head_dim / tensor * spec.qk_norm
        kept -= 4 * spec.hidden / shared + before_norm  # inputs of the norms: see `saved`
    if parallel.recompute == "none" and (not config.lora.on or "linear_proj" in config.lora.targets):
        kept += 2 * spec.heads * spec.head_dim / tensor  # our CPU attention: outputs of segments, then all in one piece
    return spec.layers * kept


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
            lora=adapters_of(case),
        )
        mine = measured(config, layouts.arrange(config.parallel, seed=0))
        gc.collect()
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, mine)
        setting = setting_of(config, "h100", 1)
        of_ranks = [part_bytes(setting, setting.stages_of(rank)) for rank in range(world)]
        activations = sum(rank.pop("activations") for rank in everyone) / world
        found[case] = {
            part: [max(rank[part] for rank in everyone), max(planned[part] for planned in of_ranks)]
            for part in everyone[0]
        }
        found[case]["activations"] = [activations, planned_activations(config, setting)]
    if dist.get_rank() == 0:
        (out / "bytes.json").write_text(json.dumps(found))
    dist.barrier()
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
