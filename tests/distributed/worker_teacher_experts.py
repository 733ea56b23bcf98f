"""Ranks of test_teacher_experts.py: a teacher with experts over two TP ranks, beside whole replicas of it.

    torchrun … worker_teacher_experts.py MODELS OUT

Rank r writes OUT/rank<r>.json: for each number format and expert parallel size, how far the hidden states of its rows
are from those of a replica in fp32, and how many tokens this rank has sent through its experts' router.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_opd import platform
from prune_opd.config import ParallelConfig
from tests.distributed.tiny_run import made_up_rollouts

CPU, BUDGET = torch.device("cpu"), 48
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def hidden_states(models: Path, parallel: ParallelConfig, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """Of every row that this rank trains on; and what the teacher's routers have seen here."""
    from megatron.core.transformer.moe.router import TopKRouter

    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.teacher import Teacher
    from prune_opd.rollout.balance import deal

    layout = layouts.arrange(parallel, seed=0)
    teacher = Teacher(models / "teacher", layout, dtype, CPU, BUDGET)
    routed = 0

    def count(router: Any, arguments: Any) -> None:
        nonlocal routed
        routed += arguments[0].shape[:-1].numel()

    for module in (module for chunk in teacher.chunks for module in chunk.modules()):
        if isinstance(module, TopKRouter):
            module.register_forward_pre_hook(count)
    rollouts = made_up_rollouts()
    dealt = [deal(rollouts.row_length_B, range(len(rollouts.responses)), layout.student.dp, BUDGET)]
    found = teacher.hidden(rollouts, dealt)
    return [found.of_row[row].float() for row in sorted(found.of_row)], {
        "routed": routed,
        "cut": teacher.layout.teacher.sequence_parallel,
        "multiple": teacher.chunks[0].token_multiple,
    }


def main(models: Path, out: Path) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts

    rank = layouts.initialize(ParallelConfig(tensor=1), machine, seed=0).rank
    whole = ParallelConfig(tensor=1)
    exact, alone = hidden_states(models, whole, torch.float32)
    results: dict[str, Any] = {"alone": alone}
    for name, dtype in DTYPES.items():
        by_itself, _ = hidden_states(models, whole, dtype)
        for expert in (1, 2):
            parallel = ParallelConfig(tensor=1, teacher_tensor=2, teacher_expert=expert)
            ours, seen = hidden_states(models, parallel, dtype)
            results[f"{name} EP{expert}"] = seen | {
                "error": distance(ours, exact),
                "error of one process": distance(by_itself, exact),
                "rows": len(ours),
            }
    (out / f"rank{rank}.json").write_text(json.dumps(results))
    layouts.shutdown()


def distance(ours: list[Tensor], exact: list[Tensor]) -> float:
    """Norm of the difference over the norm, of all rows together."""
    a, b = torch.cat(ours), torch.cat(exact)
    return float((a - b).norm() / b.norm())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
