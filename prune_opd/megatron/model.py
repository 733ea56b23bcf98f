"""A Hugging Face directory's config as a megatron-core model that hands out hidden states instead of logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from prune_opd.megatron.attention import PackedSdpaAttention
from prune_opd.megatron.packing import PackedBatch
from prune_opd.model_spec import ModelSpec


def dtype_of(params: str) -> torch.dtype:
    """`precision.params` as a torch dtype."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[params]


def transformer_config(spec: ModelSpec, tp_size: int, dtype: torch.dtype) -> TransformerConfig:
    """Settings with which megatron-core needs neither Transformer Engine nor apex, on the CPU and on a GPU."""
    return TransformerConfig(
        num_layers=spec.layers,
        hidden_size=spec.hidden,
        ffn_hidden_size=spec.ffn,
        num_attention_heads=spec.heads,
        num_query_groups=spec.kv_heads,
        kv_channels=spec.head_dim,
        layernorm_epsilon=spec.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp_size,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        perform_initialization=False,  # every weight comes from the Hugging Face directory
        use_cpu_initialization=True,
        calculate_per_token_loss=True,  # one global token mean over the global batch
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        cuda_graph_impl="none",
        batch_p2p_sync=False,
    )


def layer_spec(spec: ModelSpec) -> ModuleSpec:
    """megatron-core's local layer, with core attention that takes packed sequences."""
    layer = get_gpt_layer_local_spec(qk_layernorm=spec.qk_norm, normalization="RMSNorm")
    layer.submodules.self_attention.submodules.core_attention = PackedSdpaAttention
    return layer


class HiddenStatesGPT(GPTModel):
    """A GPT whose forward pass ends after the final norm: the loss multiplies by the output weight, in chunks."""

    spec: ModelSpec

    def forward(self, batch: PackedBatch) -> Tensor:
        """Packed tokens -> hidden_NH of every token [N, H]."""
        hidden = super().forward(
            batch.ids_N[None], batch.position_N[None], attention_mask=None, packed_seq_params=batch.attention_segments()
        )
        return hidden[:, 0]

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def head_weight(self) -> Tensor:
        """This rank's rows of the output matrix [V/tp, H]: the embedding's when they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def build(model_dir: str | Path, tp_size: int, dtype: torch.dtype, *, trainable: bool) -> HiddenStatesGPT:
    """The model with this rank's shard of the directory's weights. A teacher is built without gradients."""
    from prune_opd.weights.load import load_hf_weights

    spec = ModelSpec.read(model_dir)
    model = HiddenStatesGPT(
        config=transformer_config(spec, tp_size, dtype),
        transformer_layer_spec=layer_spec(spec),
        vocab_size=spec.padded_vocab(tp_size),
        max_sequence_length=spec.max_positions,
        share_embeddings_and_output_weights=spec.tied,
        position_embedding_type="rope",
        rotary_base=int(spec.rope_theta),
        parallel_output=True,
    ).to(dtype)  # torch's norms are fp32 whatever params_dtype says, and megatron's optimizer wants one dtype
    model.spec = spec
    load_hf_weights(model, model_dir)
    model.requires_grad_(trainable)
    return model if trainable else model.eval()
