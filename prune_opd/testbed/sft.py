"""`prune-opd sft`: supervised training of the tiny models on worked ledger solutions, through the Megatron path.

Data parallel only (TP = 1): the models are tiny. Nothing here is meant for a real model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from prune_opd import platform
from prune_opd.config import CorpusConfig, ModelShape, OptimizerConfig, SftConfig
from prune_opd.data import ledger
from prune_opd.data.tasks import sorting_example
from prune_opd.errors import ConfigError

if TYPE_CHECKING:
    from prune_opd.megatron.layout import Layout
    from prune_opd.megatron.model import HiddenStatesGPT
    from prune_opd.megatron.packing import PackedBatch
    from prune_opd.megatron.trainer import Trainer


def run(config: SftConfig) -> None:
    """Train every stage and write a Hugging Face directory to `config.output`, which appears only when complete."""
    machine = platform.prepare()
    from prune_opd.config.yaml import save_config
    from prune_opd.megatron import layout as layouts
    from prune_opd.weights.stream import export_hf

    layout = layouts.initialize(config.parallel, machine, config.seed)
    if layout.student.dp != layout.world:
        raise ConfigError("parallel: supervised training is data parallel only, set tensor=1 and all others to 1")
    output = Path(config.output)
    start = Path(config.init) if config.init else output.with_name(output.name + ".init")
    if config.init is None and layout.is_main:
        create_model(start, config.shape, config.seed)
    torch.distributed.barrier()

    source = start
    for index in range(len(config.stages)):
        chunks = _run_stage(config, index, source, layout, machine)
        source = output.with_name(output.name + ".stage")
        export_hf(chunks, start, source, write=layout.is_main)
        torch.distributed.barrier()
    if layout.is_main:
        ledger.save_tokenizer(source)
        save_config(config, source / "sft_config.yaml")
        _replace(source, output)
    layouts.shutdown()


def _run_stage(
    config: SftConfig, index: int, source: Path, layout: Layout, machine: platform.Platform
) -> list[HiddenStatesGPT]:
    """Train stage `index` from the weights in `source`."""
    from prune_opd.megatron.packing import pack
    from prune_opd.megatron.trainer import Trainer

    stage = config.stages[index]
    optimizer = OptimizerConfig(
        lr=stage.lr,
        min_lr=stage.lr * stage.final_lr,
        schedule=stage.schedule,
        warmup_steps=stage.warmup_steps,
        beta2=config.beta2,
        weight_decay=config.weight_decay,
    )
    trainer = Trainer(source, optimizer, config.parallel, stage.steps, layout, torch.float32, machine.device)
    if stage.sharpen != 1.0:
        _sharpen(trainer, stage.sharpen)
    for step in range(stage.steps):
        first = step * stage.batch
        examples = [
            example(stage.corpus, stage.seed, i)
            for i in range(first + layout.student.dp_rank, first + stage.batch, layout.student.dp)
        ]
        prompts, responses = zip(*examples, strict=True)
        batches = pack(prompts, responses, range(len(examples)), config.parallel.microbatch_tokens, machine.device)
        result = trainer.step(batches, cross_entropy)
        if layout.is_main and ((step + 1) % 25 == 0 or step + 1 == stage.steps):
            print(f"{config.name} stage {index + 1} step {step + 1}/{stage.steps} loss {result.loss:.4f}", flush=True)
    return trainer.chunks


def example(corpus: CorpusConfig, seed: int, index: int) -> tuple[list[int], list[int]]:
    """(prompt ids, response ids) number `index` of a corpus: a ledger's solution, or a sorted list."""
    share = corpus.sorting  # spread evenly: number i is one where the count of them passes a whole number
    if int((index + 1) * share) > int(index * share):
        return sorting_example(seed, index)
    return ledger.example(corpus, seed, index)


def cross_entropy(model: HiddenStatesGPT, batch: PackedBatch, hidden_NH: Tensor) -> tuple[Tensor, int]:
    """Summed cross entropy of the response tokens, TP = 1. The vocabulary's padding is left out."""
    weight_VH = model.head_weight()[: model.spec.vocab_size]
    logits_MV = hidden_NH[batch.predicting_M] @ weight_VH.T
    return F.cross_entropy(logits_MV.float(), batch.sampled_ids_M, reduction="sum"), len(batch.sampled_ids_M)


@torch.no_grad()
def _sharpen(trainer: Trainer, factor: float) -> None:
    """Scale the logits: a model trained for minutes is nearly right if decoded greedily, but far too flat at T = 1."""
    trainer.chunks[0].decoder.final_layernorm.weight.mul_(factor)
    trainer.optimizer.reload_model_params()


def create_model(directory: Path, shape: ModelShape, seed: int, vocab: int = len(ledger.VOCABULARY)) -> None:
    """Write a randomly initialised Qwen3 as a Hugging Face directory: any layout then loads the same weights."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "float32",
        "vocab_size": vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "use_cache": True,
        "bos_token_id": ledger.TOKEN_ID[ledger.BOS],
        "eos_token_id": ledger.TOKEN_ID[ledger.EOS],
        "pad_token_id": ledger.TOKEN_ID[ledger.PAD],
    }
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, std: float) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * std

    width = shape.hidden**-0.5 * shape.init_std_scale
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors = {"model.embed_tokens.weight": normal(vocab, shape.hidden, 0.5 * width)}
    for i in range(shape.layers):
        layer = f"model.layers.{i}."
        tensors |= {
            layer + "input_layernorm.weight": torch.ones(shape.hidden),
            layer + "self_attn.q_proj.weight": normal(q, shape.hidden, 0.7 * width),
            layer + "self_attn.k_proj.weight": normal(kv, shape.hidden, 0.7 * width),
            layer + "self_attn.v_proj.weight": normal(kv, shape.hidden, 0.7 * width),
            layer + "self_attn.q_norm.weight": torch.ones(shape.head_dim),
            layer + "self_attn.k_norm.weight": torch.ones(shape.head_dim),
            layer + "self_attn.o_proj.weight": normal(shape.hidden, q, 0.35 * width),
            layer + "post_attention_layernorm.weight": torch.ones(shape.hidden),
            layer + "mlp.gate_proj.weight": normal(shape.ffn, shape.hidden, 0.7 * width),
            layer + "mlp.up_proj.weight": normal(shape.ffn, shape.hidden, 0.7 * width),
            layer + "mlp.down_proj.weight": normal(shape.hidden, shape.ffn, 0.35 * width),
        }
    tensors["model.norm.weight"] = torch.ones(shape.hidden)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _replace(source: Path, output: Path) -> None:
    shutil.rmtree(output, ignore_errors=True)
    source.rename(output)
    shutil.rmtree(output.with_name(output.name + ".init"), ignore_errors=True)
