"""One side of test_te_spec.py: build every model, describe it, and carry its weights over a checkpoint.

    worker_te_spec.py FOLDER SIDE [SAVED_BY]

SIDE is "te" (real Transformer Engine modules over the stub of their kernels; one tensor-parallel group of all ranks) or
"local" (megatron-core's own modules). Reads FOLDER/<case>; writes FOLDER/<SIDE>/<case>/{hf,checkpoint} and, if SAVED_BY
is given, what the other side's checkpoint became in this side's model, as FOLDER/<SIDE>/<case>/from_<SAVED_BY>.
Descriptions go to FOLDER/<SIDE>.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from prune_opd import platform
from prune_opd.config import LoraConfig, ParallelConfig
from tests.te.cases import ADAPTERS, CASES


def described(chunk: Any, layout: Any) -> dict[str, Any]:
    from prune_opd.weights.mapping import entries, local_parameters

    layers = chunk.decoder.layers
    last = layers[-1]
    experts = [type(layer.mlp.experts).__name__ for layer in layers if hasattr(layer.mlp, "experts")]
    return {
        "modules": {
            "qkv": type(last.self_attention.linear_qkv).__name__,
            "attention": type(last.self_attention.core_attention).__name__,
            "experts": experts,
            "final norm": type(chunk.decoder.final_layernorm).__module__.split(".")[0],
        },
        "softmax scale": softmax_scale(last.self_attention.core_attention),
        "own names": [name for name, _ in chunk.named_parameters()],
        "mapped": {name: list(parameter.shape) for name, parameter in local_parameters([chunk]).items()},
        "entries": [entry.megatron for entry in entries(chunk.spec)],
        "beside parameters": sorted(chunk.state_dict().keys() - dict(chunk.named_parameters()).keys()),
        "sharded": sharded_keys(chunk),
        "forward": forward(chunk, layout),
    }


def with_adapters(model_dir: Path, layout: Any, lora: LoraConfig) -> dict[str, Any]:
    """A student with adapters: its linear layers and norms, its parameters' names in the whole model, and the table."""
    from prune_opd.megatron.lora import attach, sharded_adapters
    from prune_opd.megatron.model import build
    from prune_opd.weights.adapters import adapter_entries
    from prune_opd.weights.mapping import entries, local_parameters

    (chunk,) = chunks = build(model_dir, layout, torch.float32, trainable=True, fused_norms=False)
    attach(chunks, lora, seed=0)
    layer, here = chunk.decoder.layers[-1], local_parameters(chunks)
    return {
        "qkv": type(layer.self_attention.linear_qkv).__name__,
        "norm": type(layer.input_layernorm).__module__.split(".")[0],
        "own": sorted(here),
        "entries": sorted(e.megatron for e in (*entries(chunk.spec), *adapter_entries(chunk.spec, lora))),
        "trained": sorted(name for name, parameter in here.items() if parameter.requires_grad),
        "sharded": {name: list(shard.data.shape) for name, shard in sharded_adapters(chunk).items()},
        "forward": forward(chunk, layout),
    }


def softmax_scale(attention: Any) -> float | None:
    """None for the usual one. Transformer Engine keeps it in each of the kernels that it may choose."""
    return getattr(attention, "unfused_attention", attention).softmax_scale


def sharded_keys(chunk: Any) -> dict[str, list[int]]:
    """Whole shape of every tensor of the sharded checkpoint, by key."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    sharded = chunk.sharded_state_dict()
    apply_factories(sharded)
    return {x.key: list(x.global_shape) for x in nested_values(sharded) if isinstance(x, ShardedTensor)}


def forward(chunk: Any, layout: Any) -> str:
    """What a forward pass ends with."""
    from prune_opd.megatron.packing import pack

    (batch,) = pack([[1, 2, 3]], [[4, 5]], [0], 100, torch.device("cpu"))
    try:
        return str(list(chunk(batch).shape))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@torch.no_grad()
def main(folder: Path, side: str, saved_by: str | None = None) -> None:
    if side == "te":
        from tests.te import stub

        stub.install()
    machine = platform.prepare()
    from megatron.core import dist_checkpointing

    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.model import build
    from prune_opd.megatron.shards import load_shards
    from prune_opd.weights.stream import export_hf

    job = layouts.initialize(ParallelConfig(), machine, seed=0)
    descriptions = {}
    for case, (model, _) in CASES.items():
        out = folder / side / case
        (chunk,) = chunks = build(folder / case, job.student, getattr(torch, model.dtype), trainable=False)
        descriptions[case] = described(chunk, job.student)
        export_hf(chunks, folder / case, out / "hf", write=job.is_main)
        if job.is_main:
            (out / "checkpoint").mkdir(parents=True)
        torch.distributed.barrier()
        dist_checkpointing.save(chunk.sharded_state_dict(), str(out / "checkpoint"))
        if saved_by:
            for parameter in chunk.parameters():
                parameter.fill_(7.0)
            state = load_shards(chunk.sharded_state_dict(), folder / saved_by / case / "checkpoint")
            missing, unexpected = chunk.load_state_dict(state, strict=False)
            descriptions[case]["not loaded"] = [*missing, *unexpected]
            export_hf(chunks, folder / case, out / f"from_{saved_by}", write=job.is_main)
    adapted = {case: with_adapters(folder / case, job.student, lora) for case, lora in ADAPTERS.items()}
    if job.is_main:
        (folder / f"{side}.json").write_text(json.dumps(descriptions))
        (folder / f"{side}_adapters.json").write_text(json.dumps(adapted))
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
