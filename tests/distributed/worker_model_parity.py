"""Ranks of test_model_parity.py: megatron-core's logits of every model, in every layout of this many ranks.

    torchrun … worker_model_parity.py FOLDER

FOLDER/<case>/ is a model directory, FOLDER/expected.pt the rows and the logits that transformers computed for them.
Writes rank<r>of<world>.json: findings by layout and case. Rank 0 also writes the exported directories
FOLDER/<layout>/<case>.
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
from prune_opd.weights import load, mapping
from prune_opd.weights.cut import VOCABULARY
from prune_opd.weights.stream import export_hf
from tests.distributed.parity_cases import BF16, CASES, LAYOUTS, belongs
from tests.models import merged, tensors_of


class CountingDirectory(load.SafetensorsDirectory):
    """Counts what is read from the files."""

    total = largest = 0  # bytes

    def read(self, name: str, dim: int, begin: int, end: int) -> Tensor:
        tensor = super().read(name, dim, begin, end)
        CountingDirectory.total += tensor.nbytes
        CountingDirectory.largest = max(self.largest, tensor.nbytes)
        return tensor


def compare(
    chunks: list[Any], expected: list[Tensor], rows: dict[str, Any], layout: Any, device: Any
) -> dict[str, Any]:
    """Largest differences of the logits, on the last stage; nothing on the others."""
    from prune_opd.megatron import schedule
    from prune_opd.megatron.packing import pack

    everything = range(len(rows["prompts"]))
    (packed,) = pack(rows["prompts"], rows["responses"], everything, 10_000, device, chunks[0].token_multiple)
    alone = pack(rows["prompts"], rows["responses"], everything, 1, device, chunks[0].token_multiple)

    def logits(batch: Any, hidden_NH: Tensor) -> Tensor:
        """Whole logits [N, V] without the padded vocabulary: every rank's columns, side by side."""
        local_NV = hidden_NH @ chunks[-1].head_weight().T
        parts = [torch.empty_like(local_NV) for _ in range(layout.tp)]
        dist.all_gather(parts, local_NV.contiguous(), group=layout.groups.tp)
        return torch.cat(parts, dim=1)[:, : chunks[-1].spec.vocab_size]

    outputs = schedule.forward(chunks, layout, [packed, *alone], logits)
    if not layout.is_last_stage:
        return {}
    expected_NV = torch.cat(expected)
    packed_NV = outputs[0][: len(expected_NV)]  # dummies come last
    alone_NV = torch.cat([output[: len(row)] for output, row in zip(outputs[1:], expected, strict=True)])
    return {
        "transformers": (packed_NV - expected_NV).abs().max().item(),
        "alone": (packed_NV - alone_NV).abs().max().item(),
        "logits": packed_NV.abs().max().item(),
    }


def all_tensors(chunks: list[Any], layout: Any) -> dict[str, Tensor]:
    """The Hugging Face tensors made of all ranks' shards, on rank 0."""
    spec, groups = chunks[0].spec, layout.groups
    places = {False: groups.tp.rank(), True: groups.expt_tp.rank()}  # of an expert's weight?
    mine = {name: parameter.detach() for name, parameter in mapping.local_parameters(chunks).items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.gather_object((places, mine), everyone if dist.get_rank() == 0 else None)
    if dist.get_rank():
        return {}
    tensors: dict[str, Tensor] = {}
    for entry in mapping.entries(spec):
        is_expert = entry.expert is not None
        shards = {places[is_expert]: held[entry.megatron] for places, held in everyone if entry.megatron in held}
        tensors |= merged(entry, [shards[i] for i in sorted(shards)])
    return tensors


def own_bytes(chunks: list[Any]) -> tuple[int, int]:
    """Of this rank's parameters without the padding of the vocabulary: all of them, and the largest one."""
    sizes = []
    spec = chunks[0].spec
    local = mapping.local_parameters(chunks)
    for entry in mapping.entries(spec):
        if entry.megatron in local:
            parameter = local[entry.megatron]
            rows = len(parameter)
            if entry.cut == VOCABULARY:
                rows = max(0, min(rows, spec.vocab_size - chunks[0].pg_collection.tp.rank() * rows))
            sizes.append(parameter[:rows].nbytes)
    return sum(sizes), max(sizes)


def check(
    directory: Path, layout_name: str, layout: Any, job: Any, dtype: torch.dtype
) -> tuple[list[Any], dict[str, Any]]:
    from prune_opd.megatron.model import build

    CountingDirectory.total = CountingDirectory.largest = 0
    chunks = build(directory, layout, dtype, trainable=False)
    on_disk = tensors_of(directory)
    tensors = all_tensors(chunks, layout)
    export_hf(chunks, directory, directory.parent / layout_name / directory.name, write=job.is_main)
    own, largest = own_bytes(chunks)
    return chunks, {
        "bits": not job.is_main
        or (tensors.keys() == on_disk.keys() and all(same(tensors[x], on_disk[x]) for x in on_disk)),
        "read": [CountingDirectory.total, CountingDirectory.largest],
        "own": [own, largest],
        "whole": sum(tensor.nbytes for tensor in on_disk.values()),
    }


def same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@torch.no_grad()
def main(folder: Path) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts

    load.SafetensorsDirectory = CountingDirectory  # type: ignore[misc]
    job = layouts.initialize(ParallelConfig(tensor=1), machine, seed=0)
    rows, expected = torch.load(folder / "expected.pt")
    findings: dict[str, dict[str, Any]] = {}
    for name, parallel in LAYOUTS[job.world].items():
        layout = layouts.arrange(parallel, seed=0).student
        found = findings[name] = {}
        for case, model in (CASES | BF16).items():
            if belongs(case, name):
                chunks, found[case] = check(folder / case, name, layout, job, getattr(torch, model.dtype))
                if case in CASES:
                    found[case] |= compare(chunks, expected[case], rows, layout, machine.device)
    (folder / f"rank{job.rank}of{job.world}.json").write_text(json.dumps(findings))
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
