"""A Hugging Face directory's config as a megatron-core model that hands out hidden states instead of logits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from prune_opd import platform
from prune_opd.config import LoraConfig
from prune_opd.config.lora import NO_LORA
from prune_opd.errors import UserError
from prune_opd.megatron.layout import ModelLayout
from prune_opd.megatron.local_layers import PackedSdpaAttention, RMSNorm, use_rms_norm
from prune_opd.megatron.packing import PackedBatch
from prune_opd.megatron.precision import token_multiple
from prune_opd.megatron.rope import attention_scale, set_frequencies
from prune_opd.model_spec import ModelSpec, MoeSpec
from prune_opd.weights.load import load_hf_weights

APEX_KERNEL = "fused_weight_gradient_mlp_cuda"  # NVIDIA's apex; megatron-core imports it by this name


def dtype_of(params: str) -> torch.dtype:
    """`precision.params` as a torch dtype."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[params]


def transformer_config(spec: ModelSpec, layout: ModelLayout, dtype: torch.dtype, **settings: Any) -> TransformerConfig:
    """Settings that hold with and without Transformer Engine and apex, on the CPU and on a GPU."""
    return TransformerConfig(
        **(_expert_settings(spec.moe, layout) if spec.moe else {}),
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
        softmax_scale=attention_scale(spec),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sequence_parallel,
        variable_seq_lengths=True,  # packed micro-batches are as long as their rows
        moe_token_dispatcher_type="alltoall",  # what variable lengths ask for, also where there are no experts
        overlap_p2p_comm=layout.vp > 1,
        batch_p2p_comm=layout.vp == 1,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        perform_initialization=False,  # every weight comes from the Hugging Face directory
        use_cpu_initialization=True,
        calculate_per_token_loss=True,  # one global token mean over the global batch
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        cuda_graph_impl="none",
        batch_p2p_sync=False,
        **fusions(HAVE_TE, spec.moe is not None),
        **settings,
    )


def fusions(engine: bool, experts: bool) -> dict[str, bool]:
    """The fused kernels that Transformer Engine (`engine`) has. Unfused, rotating packed rows waits for the device:
    it needs each segment's length on the host, four times a layer."""
    return {
        "apply_rope_fusion": engine,
        "bias_activation_fusion": engine,  # SwiGLU
        "moe_permute_fusion": engine and experts,
    }


def gradient_fusion(on_gpu: bool) -> dict[str, bool]:
    """A weight's gradient is added to the fp32 buffer by its own matrix product, where apex has the kernel."""
    return {"gradient_accumulation_fusion": on_gpu and importlib.util.find_spec(APEX_KERNEL) is not None}


def _expert_settings(moe: MoeSpec, layout: ModelLayout) -> dict[str, Any]:
    """Routing as transformers does it: softmax over all experts in fp32, the top k, every token to all of its k.

    With weights that sum to 1, softmax over the k is the same number; else it must come before the choice.
    """
    return {
        "num_moe_experts": moe.experts,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.groups.expt_tp.size(),
        "moe_ffn_hidden_size": moe.ffn,
        # A list also keeps each layer by itself in checkpoints: only needed where layers differ.
        "moe_layer_freq": 1 if all(moe.sparse) else [int(sparse) for sparse in moe.sparse],
        "moe_router_topk": moe.per_token,
        "moe_router_pre_softmax": not moe.normalised,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",  # no auxiliary loss
        "moe_grouped_gemm": HAVE_TE,
    }


def layer_spec(spec: ModelSpec, *, sparse: bool = False, fused_norms: bool = True) -> ModuleSpec:
    """One decoder layer, with experts if it is `sparse`: the one place that chooses between the two sets of modules.

    Transformer Engine's where it is installed. Else megatron-core's own, with experts one after the other and core
    attention that takes packed sequences. fused_norms: whether a norm may be a part of the linear layer behind it,
    whose input nobody else then gets.
    """
    experts = spec.moe.experts if spec.moe and sparse else None
    if HAVE_TE:
        engine = get_gpt_layer_with_transformer_engine_spec(experts, moe_grouped_gemm=sparse, qk_layernorm=spec.qk_norm)
        return engine if fused_norms else _with_norms_apart(engine)
    layer = get_gpt_layer_local_spec(experts, qk_layernorm=spec.qk_norm, normalization="RMSNorm")
    layer.submodules.self_attention.submodules.core_attention = PackedSdpaAttention
    if sparse:  # checkpoints would call it as if it were fused with a dense layer, and Transformer Engine's would not
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return layer


def _with_norms_apart(layer: ModuleSpec) -> ModuleSpec:
    """A layer of Transformer Engine's modules whose norms are modules of their own, as in megatron-core's layers."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    parts = layer.submodules
    parts.input_layernorm = TENorm
    parts.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    if parts.mlp.submodules is not None and hasattr(parts.mlp.submodules, "linear_fc1"):  # experts have their norm
        parts.pre_mlp_layernorm = TENorm
        parts.mlp.submodules.linear_fc1 = TEColumnParallelLinear
    return layer


class HiddenStatesGPT(GPTModel):
    """A GPT, or a pipeline stage's chunk of one, whose last stage ends after the final norm.

    The loss multiplies by the output weight, in chunks of tokens.
    """

    spec: ModelSpec
    lora: LoraConfig = NO_LORA  # of its adapters (lora.py)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Packed tokens -> hidden_NH of every token [N, H], the same on every rank of the TP group.

        Chunks that do not end the model hand on [N, 1, H], with sequence parallelism this rank's part of the tokens;
        chunks that do not begin it go on from such an input, which the schedule sets (`set_input_tensor`).
        """
        ids, positions = (batch.ids_N[None], batch.position_N[None]) if self.pre_process else (None, None)
        hidden = super().forward(ids, positions, attention_mask=None, packed_seq_params=batch.attention_segments())
        self.decoder.input_tensor = (
            None  # what came from the stage before, and its gradient: until the next micro-batch
        )
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            # The loss gives every rank of the group the whole gradient already: each keeps the part of its tokens.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden[:, 0]

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    @property
    def token_multiple(self) -> int:
        """What the tokens of a packed batch must be a multiple of."""
        config = self.config
        recipe = config.fp8_recipe if config.fp8 else None
        return token_multiple(recipe, config.tensor_model_parallel_size, config.sequence_parallel)

    def head_weight(self) -> Tensor:
        """This rank's rows of the output matrix [V/tp, H], on the last stage: the embedding's when they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def build(
    model_dir: str | Path,
    layout: ModelLayout,
    dtype: torch.dtype,
    *,
    trainable: bool,
    head: bool = True,
    fused_norms: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> list[HiddenStatesGPT]:
    """This rank's chunks of the model (one but for a virtual pipeline) with its shards of the directory's weights.

    head: with the output matrix, if it is not the embedding's. fused_norms: of `layer_spec`. settings: of
    `TransformerConfig`, beside the layout's and the model's. A teacher is built without gradients. `UserError` for FP8
    that the layers would ignore.
    """
    spec = ModelSpec.read(model_dir)
    if spec.moe:
        platform.prepare_experts()
    own = gradient_fusion(not platform.prepare().is_cpu and trainable)
    config = transformer_config(spec, layout, dtype, **own, **(settings or {}))
    stages = range(layout.vp) if layout.vp > 1 else (None,)
    layers = partial(layer_spec, spec, fused_norms=fused_norms)
    chunks = [_build_chunk(spec, config, layout, stage, layers) for stage in stages]
    if config.fp8:
        _assert_fp8_layers(chunks, str(model_dir))
    if not head and chunks[-1].post_process:
        del chunks[-1].output_layer
    load_hf_weights(chunks, model_dir)
    for chunk in chunks:
        chunk.requires_grad_(trainable)
        chunk.train(trainable)
    return chunks


def _assert_fp8_layers(chunks: list[HiddenStatesGPT], model: str) -> None:
    """megatron-core ignores `fp8=` without a word in layers that are not Transformer Engine's, or without that."""
    linears = [layer.self_attention.linear_qkv for chunk in chunks for layer in chunk.decoder.layers]
    if not HAVE_TE or any("transformer_engine" not in type(linear).__module__ for linear in linears):
        raise UserError(f"{model}: FP8 is asked for and the layers are not Transformer Engine's: leave FP8 off")


def _build_chunk(
    spec: ModelSpec,
    config: TransformerConfig,
    layout: ModelLayout,
    vp_stage: int | None,
    layers: Callable[..., ModuleSpec],
) -> HiddenStatesGPT:
    chunk = HiddenStatesGPT(
        config=config,
        transformer_layer_spec=_block_spec(spec, config, layout, vp_stage, layers),
        vocab_size=spec.padded_vocab(layout.tp),
        max_sequence_length=spec.max_positions,
        pre_process=layout.groups.pp.rank() == 0 and not vp_stage,
        post_process=layout.is_last_stage and vp_stage in (None, layout.vp - 1),
        share_embeddings_and_output_weights=spec.tied,
        position_embedding_type="rope",
        parallel_output=True,
        pg_collection=layout.groups,
        vp_stage=vp_stage,
    ).to(config.params_dtype)  # torch's norms are fp32 whatever it says, and megatron's optimizer wants one dtype
    chunk.spec = spec
    set_frequencies(chunk, spec)
    for module in chunk.modules():
        if isinstance(module, MoELayer):
            release_routing(module)
    return chunk


def release_routing(layer: MoELayer) -> None:
    """Have a layer's dispatcher forget the tokens' routing as soon as the layer has gone forward.

    megatron-core's keeps it in its attributes until the layer is called again. Where the layer is recomputed, that
    holds the graph of the router, which ends in the layer's input and in the gradient that this has got. The backward
    pass needs none of it: autograd has saved what it uses.
    """
    dispatcher = layer.token_dispatcher
    permanent = {name for name, value in vars(dispatcher).items() if isinstance(value, Tensor)}

    def forget(*_: Any) -> None:
        for name, value in vars(dispatcher).items():
            if isinstance(value, Tensor) and name not in permanent:
                setattr(dispatcher, name, None)

    layer.register_forward_hook(forget)


def _block_spec(
    spec: ModelSpec,
    config: TransformerConfig,
    layout: ModelLayout,
    vp_stage: int | None,
    layer_of: Callable[..., ModuleSpec],
) -> TransformerBlockSubmodules:
    """This chunk's layers, and the final norm: ours with local layers, else megatron-core's choice."""
    stage = layout.groups.pp.rank()
    first = get_transformer_layer_offset(config, vp_stage, stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage, stage))
    specs = [layer_of(sparse=spec.is_sparse(layer)) for layer in layers]
    ours = [use_rms_norm(layer) for layer in specs]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm if any(ours) else LayerNormImpl)
