"""The norm of a model whose parameters lie on many ranks: each counts once, wherever it is and however often."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import MegatronModule, param_is_not_shared
from torch import Tensor


@torch.no_grad()
def parameter_norm(chunks: Sequence[MegatronModule], groups: Any) -> float:
    """Euclidean norm of all parameters, fp32 products summed up in fp64. One collective of the whole job.

    chunks: this rank's part of the model. groups: megatron's ProcessGroupCollection of it.
    """
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    square = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    for parameter in _counted(parameters, groups):
        square += torch.linalg.vector_norm(parameter, dtype=torch.float32).double().square()
    dist.all_reduce(square)
    return float(square.sqrt())


def _counted(parameters: Iterable[Tensor], groups: Any) -> Iterable[Tensor]:
    """Those that this rank counts: no replica, no copy of a tied embedding, no duplicate of another TP rank."""
    for parameter in parameters:
        expert = not getattr(parameter, "allreduce", True)  # megatron's mark: other replicas than a dense one has
        replica = (groups.expt_dp if expert else groups.dp_cp).rank() != 0
        whole = expert or param_is_not_tensor_parallel_duplicate(parameter, groups.tp)
        if whole and not replica and param_is_not_shared(parameter):
            yield parameter
