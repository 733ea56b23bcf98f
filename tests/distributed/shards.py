"""A case's weights on the ranks of a tensor-parallel group, and back; how far a result is from what it should be."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.config import GateConfig, ObjectiveConfig, WeightingConfig
from prune_opd.method.objective import on_vocabulary
from tests.reference import Case


def shard_of(weight_VH: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's rows. A height that the group does not divide is padded, with rows that would win every top-k."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    missing = -len(weight_VH) % ranks
    weight_VH = torch.cat([weight_VH, torch.full((missing, weight_VH.shape[1]), 50.0, dtype=weight_VH.dtype)])
    return weight_VH.chunk(ranks)[rank].clone()


def sharded(case: Case, group: dist.ProcessGroup) -> Case:
    return dataclasses.replace(
        case,
        student_weight=shard_of(case.student_weight, group),
        teacher_weight=shard_of(case.teacher_weight, group),
    )


def whole(shard_VH: Tensor, rows: int, group: dist.ProcessGroup) -> Tensor:
    """The group's shards one under the other, without the rows that `shard_of` has added."""
    parts = [torch.empty_like(shard_VH) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, shard_VH.contiguous(), group=group)
    return torch.cat(parts)[:rows]


def error(got: Tensor, expected: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0 if got.shape == expected.shape else math.inf
    scale = max(expected.abs().max().item(), 1e-3)
    return ((got.double() - expected.double()).abs().max() / scale).item()


def is_aligned(
    shard: Case,
    group: dist.ProcessGroup,
    objective: ObjectiveConfig,
    weighting: WeightingConfig,
    gate: GateConfig | None = None,
) -> bool:
    """Whether a rank has the same token ids of both models: it needs them for some, and exchanges rows to get them."""
    alike = len(shard.student_weight) == len(shard.teacher_weight) or dist.get_world_size(group) == 1
    asked = objective.baseline != "none" or (gate is not None and gate.metric == "kl_agreement")
    return alike or asked or on_vocabulary(objective) or weighting.name == "tip"
