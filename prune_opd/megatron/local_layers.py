"""What layers are made of where there is no Transformer Engine: core attention for packed sequences, and RMSNorm.

`model.layer_spec` chooses. With Transformer Engine a layer gets megatron-core's `TEDotProductAttention`, which hands
what `PackedBatch.attention_segments` says (`qkv_format="thd"`, int32 `cu_seqlens` on the device) to TE's flash or fused
attention, and is the only one with context parallelism. It cannot run without a GPU, and nobody has run it yet.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class PackedSdpaAttention(MegatronModule):
    """Causal attention inside each segment of a packed batch (`qkv_format="thd"`); nothing crosses a segment boundary.

    Takes the place of megatron-core's `DotProductAttention`, which has no packed path, in the layer spec. Time and
    memory are those of the segments: nothing of the size of a whole batch squared exists.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal or config.attention_dropout:
            raise ValueError("PackedSdpaAttention is causal self-attention without dropout")
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """query [N, heads/tp, D]; key, value [N, kv_heads/tp, D] -> [N, heads/tp * D]."""
        if packed_seq_params is None:
            raise ValueError("PackedSdpaAttention takes packed sequences only (packed_seq_params)")
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        segments = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        outputs = [self._attend(*(x.transpose(0, 1)[None] for x in segment)) for segment in segments]
        return torch.cat(outputs)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Grouped heads are left to SDPA: as fast as repeating keys and values first, in half the memory.
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped)
        return out[0].transpose(0, 1).flatten(1)


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
