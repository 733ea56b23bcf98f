"""Ranks of test_stream.py: what comes out of the resharding stream in every layout, transport and bucket size.

    torchrun … worker_stream.py MODELS OUT

Writes OUT/<layout>.json from rank 0: for each case what is wrong on any rank.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd import platform
from prune_opd.config import ParallelConfig
from prune_opd.errors import UserError

LAYOUTS = {
    2: {
        "tp2": ParallelConfig(tensor=2),
        "pp2": ParallelConfig(tensor=1, pipeline=2),
        "pp2 vpp2": ParallelConfig(tensor=1, pipeline=2, virtual_pipeline=2),
        "dp2": ParallelConfig(tensor=1),
    },
    4: {
        "tp2 pp2": ParallelConfig(tensor=2, pipeline=2),
        "tp2 dp2": ParallelConfig(tensor=2),
    },
}
TRANSPORTS = ("collective", "shared")
# Of the tiny model's parameters the vocabulary's are the largest: the first size is below every matrix's, the second
# holds a few of them, the last everything.
BUCKETS_MB = (0.001, 0.1, 512)


def wrong_tensors(resharder: Any, expected: dict[str, Tensor]) -> list[str]:
    """Names that come twice, not at all, or with other bits; each is looked at while it is handed on, and let go."""
    wrong, missing = [], set(expected)
    for name, tensor in resharder.stream():
        if name not in missing or not tensor.is_contiguous() or not torch.equal(tensor, expected[name]):
            wrong.append(name)
        missing.discard(name)
    return wrong + sorted(missing)


def kept_tensors(resharder: Any, expected: dict[str, Tensor]) -> list[str]:
    """The same for a consumer that keeps everything to the end."""
    kept = dict(resharder.stream())
    return [name for name, tensor in expected.items() if not torch.equal(kept[name], tensor)]


def changed_parameters(chunks: list[Any], before: list[Tensor]) -> int:
    after = [parameter for chunk in chunks for parameter in chunk.parameters()]
    return sum(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def case(chunks: list[Any], expected: dict[str, Tensor], transport: str, bucket_mb: float) -> dict[str, Any]:
    from prune_opd.weights.stream import Resharder

    before = [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]
    resharder = Resharder(chunks, bucket_mb, transport)
    result: dict[str, Any] = {"buckets": len(resharder.buckets)}
    result["wrong"] = wrong_tensors(resharder, expected) + wrong_tensors(resharder, expected)
    result["buffers"] = len(resharder._buffers)
    with torch.no_grad():
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            parameter.mul_(2)
    doubled = {name: 2 * tensor for name, tensor in expected.items()}
    result["wrong after an update"] = wrong_tensors(resharder, doubled)
    result["wrong when kept"] = kept_tensors(resharder, doubled)
    with torch.no_grad():
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            parameter.div_(2)
    result["changed parameters"] = changed_parameters(chunks, before)
    return result


def corruption(chunks: list[Any], transport: str) -> str:
    """What is said on this rank when the last rank's memory changes under a tensor that the first has sent."""
    from prune_opd.weights.stream import Resharder

    resharder = Resharder(chunks, 512, transport)
    broken = next(
        item
        for bucket in resharder.buckets
        for item in bucket.items
        if not item.everywhere and item.owners[0] == 0 and item.entry.cut == "columns"
    )
    try:
        for name, tensor in resharder.stream():
            if name == broken.entry.hf[0] and resharder.group.rank() == resharder.group.size() - 1:
                tensor[1, 0] += 1e-6
    except UserError as reason:
        return f"{broken.entry.hf[0]}: {reason}"
    return "nothing"


def main(models: Path, out: Path) -> None:
    machine = platform.prepare()
    from safetensors.torch import load_file

    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.model import build

    layouts.initialize(ParallelConfig(), machine, seed=0)
    for name, parallel in LAYOUTS[dist.get_world_size()].items():
        layout = layouts.arrange(parallel, seed=0)
        results: dict[str, Any] = {}
        for model in sorted(models.iterdir()):
            expected = load_file(model / "model.safetensors")
            chunks = build(model, layout.student, torch.float32, trainable=True)
            for transport in TRANSPORTS:
                for bucket_mb in BUCKETS_MB:
                    results[f"{model.name}, {transport}, {bucket_mb} MB"] = case(chunks, expected, transport, bucket_mb)
                if layout.student.groups.mp.size() > 1:
                    results[f"{model.name}, {transport}, corrupted"] = corruption(chunks, transport)
        everyone: list[Any] = [None] * layout.world
        dist.all_gather_object(everyone, results)
        if layout.is_main:
            (out / f"{name}.json").write_text(json.dumps(everyone))
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
