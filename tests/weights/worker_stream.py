"""Ranks of test_stream.py: what comes out of the resharding stream in every layout, transport and bucket size.

    torchrun … worker_stream.py MODELS OUT

Writes OUT/<layout>.json from rank 0: for each case what is wrong on any rank.
"""

from __future__ import annotations

import json
import sys
from collections import deque
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
        "ep2": ParallelConfig(tensor=1, expert=2),
    },
    4: {
        "tp2 pp2": ParallelConfig(tensor=2, pipeline=2),
        "tp2 dp2": ParallelConfig(tensor=2),
        "tp2 ep2": ParallelConfig(tensor=2, expert=2),
        "pp2 ep2": ParallelConfig(tensor=1, pipeline=2, expert=2),
    },
}
TRANSPORTS = ("collective", "shared")
DRIFTS = ("tp2 pp2", "pp2 ep2")  # where a tensor is on several ranks and not on all
# Below every matrix of the tiny models; a layer or two; everything.
BUCKETS_MB = (0.001, 0.25, 512)


def models_of(parallel: ParallelConfig, models: Path) -> list[Path]:
    """Expert parallelism is for the model with experts; of the others one goes to four ranks, which take their time."""
    dense = ["qwen2 untied"] if dist.get_world_size() == 4 else ["qwen2 untied", "qwen3 tied"]
    return [models / name for name in (["qwen3 moe"] if parallel.expert > 1 else dense)]


def wrong_tensors(resharder: Any, expected: dict[str, Tensor], keeps: int = 1) -> list[str]:
    """Names that come twice, not at all, or with other bits, for a consumer that holds on to the last `keeps`."""
    wrong, missing, kept = [], set(expected), deque[tuple[str, Tensor]](maxlen=keeps)
    for name, tensor in resharder.stream():
        kept.append((name, tensor))
        wrong += [name for name, held in kept if not held.is_contiguous() or not torch.equal(held, expected[name])]
        if name not in missing:
            wrong.append(name)
        missing.discard(name)
    return wrong + sorted(missing)


def scale(chunks: list[Any], factor: float) -> None:
    """An update of every parameter, exact for powers of two."""
    with torch.no_grad():
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            parameter.mul_(factor)


def case(chunks: list[Any], expected: dict[str, Tensor], transport: str, bucket_mb: float) -> dict[str, Any]:
    """One transport and bucket size; with the middle one, also a second stream, and consumers that keep tensors."""
    from prune_opd.weights.stream import LAG, Resharder

    before = [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]
    resharder = Resharder(chunks, bucket_mb, transport)
    result: dict[str, Any] = {"buckets": len(resharder.buckets), "wrong": wrong_tensors(resharder, expected)}
    result["buffers"] = len(resharder._buffers)
    if bucket_mb == BUCKETS_MB[1]:
        scale(chunks, 2)
        doubled = {name: 2 * tensor for name, tensor in expected.items()}
        result["wrong after an update"] = wrong_tensors(resharder, doubled, keeps=LAG - 1)
        result["buffers of one that keeps a few"] = len(resharder._buffers)
        result["wrong when kept"] = wrong_tensors(resharder, doubled, keeps=len(expected))
        scale(chunks, 0.5)
    after = [parameter for chunk in chunks for parameter in chunk.parameters()]
    result["changed parameters"] = sum(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    return result


def corruption(chunks: list[Any], transport: str) -> str:
    """What is said on this rank when the last rank's memory changes under a tensor that the first has sent."""
    from prune_opd.weights.cut import COLUMNS
    from prune_opd.weights.stream import Resharder

    resharder = Resharder(chunks, 512, transport)
    broken = next(
        item
        for bucket in resharder.buckets
        for item in bucket.items
        if not item.everywhere and item.owners[0] == 0 and item.entry.cut == COLUMNS
    )
    try:
        for name, tensor in resharder.stream():
            if name == broken.entry.hf[0] and resharder.group.rank() == resharder.group.size() - 1:
                tensor[1, 0] += 1e-6
    except UserError as reason:
        return f"{broken.entry.hf[0]}: {reason}"
    return "nothing"


def drift(chunks: list[Any], transport: str) -> dict[str, Any]:
    """What is said when a rank's replica of a tensor that another one sends has changed, and what becomes of it."""
    from prune_opd.weights.mapping import local_parameters
    from prune_opd.weights.stream import Resharder

    resharder, here = Resharder(chunks, 512, transport), local_parameters(chunks)
    rank, ranks = resharder.group.rank(), resharder.group.size()
    items = [item for bucket in resharder.buckets for item in bucket.items if not item.everywhere and item.count == 1]
    mine = [item.entry.megatron in here and item.owners[0] != rank for item in items]
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, mine, group=resharder.group)
    at, holder = next((i, r) for i in range(len(items)) for r in range(ranks) if everyone[r][i])
    name = items[at].entry.megatron
    with torch.no_grad():
        whole = here[name].detach().clone() if name in here else None
        if rank == holder:
            here[name].add_(1.0)
        before = here[name].detach().clone() if name in here else None
        try:
            for _ in resharder.stream():
                pass
            error = "nothing"
        except UserError as reason:
            error = str(reason)
        untouched = before is None or torch.equal(before, here[name])
        if whole is not None:
            here[name].copy_(whole)
    return {"tensor": items[at].entry.hf[0], "error": error, "untouched": untouched}


def main(models: Path, out: Path) -> None:
    machine = platform.prepare()
    from safetensors.torch import load_file

    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.model import build
    from prune_opd.weights.stream import Resharder

    layouts.initialize(ParallelConfig(), machine, seed=0)
    for name, parallel in LAYOUTS[dist.get_world_size()].items():
        layout = layouts.arrange(parallel, seed=0)
        results: dict[str, Any] = {}
        for model in models_of(parallel, models):
            expected = load_file(model / "model.safetensors")
            chunks = build(model, layout.student, torch.float32, trainable=True)
            for transport in TRANSPORTS:
                for bucket_mb in BUCKETS_MB:
                    results[f"{model.name}, {transport}, {bucket_mb} MB"] = case(chunks, expected, transport, bucket_mb)
                if Resharder(chunks).group.size() > 1:
                    results[f"{model.name}, {transport}, corrupted"] = corruption(chunks, transport)
                if name in DRIFTS:
                    results[f"{model.name}, {transport}, drifted"] = drift(chunks, transport)
        everyone: list[Any] = [None] * layout.world
        dist.all_gather_object(everyone, results)
        if layout.is_main:
            (out / f"{name}.json").write_text(json.dumps(everyone))
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
