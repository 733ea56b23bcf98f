"""Cases of worker_distill.py: bf16 gradients of a sharp and converged pair on vocabulary shards."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from prune_opd.config import ObjectiveConfig, WeightingConfig
from tests.distributed.answers import ANSWERS
from tests.distributed.shards import sharded, whole
from tests.sharp import SHARP_CASES, Gradients, gradients, sharp_case

SHARP = sharp_case()


def compare_sharp(group: dist.ProcessGroup, objective: ObjectiveConfig, weighting: WeightingConfig) -> dict[str, float]:
    """Both gradients against float64 of the same bf16 inputs on one rank; the errors are those of whole vectors."""
    expected: Gradients = ANSWERS.find(
        ("sharp", SHARP, objective, weighting), lambda: gradients(SHARP, objective, weighting, torch.float64)
    )
    shard = gradients(sharded(SHARP, group), objective, weighting, tp_group=group)
    got = Gradients(shard.hidden_NH, whole(shard.weight_VH, len(expected.weight_VH), group))
    hidden, weight = got.error(expected)
    return {"loss": 0.0, "hidden_gradient": hidden, "weight_gradient": weight, "statistics": 0.0}


BF16_CASES: dict[str, Callable[[dist.ProcessGroup], dict[str, float]]] = {
    f"{name}, sharp": lambda group, o=objective, w=weighting: compare_sharp(group, o, w)
    for name, (objective, weighting) in SHARP_CASES.items()
}
WEIGHTED = [f"{name}, sharp" for name, (_, weighting) in SHARP_CASES.items() if weighting.name != "none"]
FEW = WEIGHTED[::7]  # every weighting with some objectives


def is_tried(case: str, ranks: int, tp: int) -> bool:
    """In bf16 weightings differ from fp32 in nothing but the products: tests/loss/test_bf16.py has all, on no group.

    Groups side by side are tried in float64: whom a rank asks is not a matter of the dtype.
    """
    if tp < ranks and case.split()[-1] in ("float32", "bfloat16", "sharp"):
        return False
    return case not in WEIGHTED or (ranks <= 2 and case in FEW)
