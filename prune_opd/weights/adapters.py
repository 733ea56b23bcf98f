"""Low-rank adapters as weights: merged into the matrices they belong to, and as a directory that `peft` loads.

A layer's adapter is two more parameters beside its weight W: a [rank, in] and b [out, rank]. What the layer does is
W + alpha / rank · b a. Of a matrix cut by rows b is cut as W is and a is whole on every rank, of one cut by columns it
is the other way round (megatron/lora.py), so that every rank merges its shard of W alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from prune_opd.config import LoraConfig
from prune_opd.model_spec import ModelSpec
from prune_opd.weights.cut import COLUMNS, WHOLE
from prune_opd.weights.mapping import Entry, entries

PEFT_PREFIX = "base_model.model."  # of every name in an adapter's file
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def adapter_name(weight: str, part: str) -> str:
    """The parameter `part` (a, b) of the adapter beside a weight, by the name of that."""
    return f"{weight.removesuffix('weight')}adapter.{part}"


def has_adapter(name: str, parameters: Mapping[str, Tensor]) -> bool:
    """Whether there is an adapter beside the parameter of this name."""
    return name.endswith("weight") and adapter_name(name, "a") in parameters


@torch.no_grad()
def merged(name: str, parameters: Mapping[str, Tensor], lora: LoraConfig) -> Tensor | None:
    """This rank's shard of a parameter with its adapter, if it has one: computed in fp32, in the weight's dtype.

    Without one it is the parameter itself; None where this rank does not have it.
    """
    parameter = parameters.get(name)
    if parameter is None or not has_adapter(name, parameters):
        return None if parameter is None else parameter.detach()
    a, b = (parameters[adapter_name(name, part)].detach().float() for part in "ab")
    return torch.addmm(parameter.detach().float(), b, a, alpha=lora.scale).to(parameter.dtype)


def adapter_entries(spec: ModelSpec, lora: LoraConfig) -> Iterator[Entry]:
    """Every parameter of the adapters, as `entries` has those of the model; the tensors by `peft`'s names.

    The a of a matrix that Hugging Face has in several parts (q, k and v; gate and up) goes by the first one's name.
    """
    for entry in entries(spec):
        linear, _, kind = entry.megatron.rpartition(".")
        if kind != "weight" or entry.expert is not None or linear.rpartition(".")[2] not in lora.targets:
            continue
        by_columns, columns = entry.cut == COLUMNS, entry.shapes[0][1]
        names = [PEFT_PREFIX + name.removesuffix("weight") for name in entry.hf]
        yield Entry(
            adapter_name(entry.megatron, "a"),
            (f"{names[0]}lora_A.weight",),
            ((lora.rank, columns),),
            COLUMNS if by_columns else WHOLE,
        )
        yield Entry(
            adapter_name(entry.megatron, "b"),
            tuple(f"{name}lora_B.weight" for name in names),
            tuple((shape[0], lora.rank) for shape in entry.shapes),
            WHOLE if by_columns else entry.cut,
        )


def peft_tensors(spec: ModelSpec, lora: LoraConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `adapter_entries` as `peft` wants them: each part of a matrix with an a of its own."""
    found: dict[str, Tensor] = {}
    table = list(adapter_entries(spec, lora))
    for of_a, of_b in zip(table[::2], table[1::2], strict=True):
        for name in of_b.hf:
            found[name.replace("lora_B", "lora_A")] = tensors[of_a.hf[0]].clone()
            found[name] = tensors[name]
    return found


def peft_config(spec: ModelSpec, lora: LoraConfig, base: str) -> dict[str, object]:
    """`adapter_config.json`. base: the Hugging Face directory that the adapters belong to."""
    names = {name.split(".")[-3] for entry in adapter_entries(spec, lora) for name in entry.hf}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(names),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }


def write_peft(directory: Path, spec: ModelSpec, lora: LoraConfig, base: str, tensors: Mapping[str, Tensor]) -> None:
    """The directory appears under its name when it is complete."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = partial / WEIGHTS_FILE
    save_file(peft_tensors(spec, lora, tensors), weights, metadata={"format": "pt"})
    weights.chmod(partial.stat().st_mode & 0o666)  # safetensors gives it to its owner alone: as the umask has it
    (partial / CONFIG_FILE).write_text(json.dumps(peft_config(spec, lora, base), indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
