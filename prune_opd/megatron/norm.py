"""RMSNorm for the local layer spec, also where sequence parallelism gives each rank a part of the tokens."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's norm, with a weight that says whether its gradient is a part only, to be summed over the TP group.

    megatron-core's own wrapper of torch's norms refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        weight: Any = self.weight
        weight.sequence_parallel = config.sequence_parallel


def use_rms_norm(layer: ModuleSpec) -> bool:
    """Put `RMSNorm` where a local layer spec has megatron-core's wrapper; False for a spec that has other norms."""
    found = False
    for submodules in (layer.submodules, layer.submodules.self_attention.submodules):
        for slot, module in vars(submodules).items():
            if module is WrappedTorchNorm:
                setattr(submodules, slot, RMSNorm)
                found = True
    return found
