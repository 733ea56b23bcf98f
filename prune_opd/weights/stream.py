"""The resharding stream: a megatron-core model's shards as whole Hugging Face tensors, one parameter after the other.

Every rank of the tensor-parallel group must draw from its stream to the end, in step: each parameter is an all-gather.
No rank ever holds more than one gathered parameter beyond what the consumer keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.weights.mapping import entries, local_parameters, merge_shards

if TYPE_CHECKING:
    from prune_opd.megatron.model import HiddenStatesGPT

MAX_FILE_BYTES = 5 * 2**30


@torch.no_grad()
def hf_stream(chunks: Sequence[HiddenStatesGPT]) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole contiguous tensor) of every parameter, on every rank of the TP group."""
    spec, tp = chunks[0].spec, chunks[0].pg_collection.tp
    parameters = local_parameters(chunks)
    for entry in entries(spec):
        local = parameters[entry.megatron].detach().contiguous()
        if tp.size() == 1 or entry.cut == "whole":
            shards = [local]
        else:
            shards = [torch.empty_like(local) for _ in range(tp.size())]
            dist.all_gather(shards, local, group=tp)
        yield from merge_shards(entry, spec, shards)


def export_hf(chunks: Sequence[HiddenStatesGPT], source_dir: str | Path, out_dir: str | Path, *, write: bool) -> None:
    """Write a Hugging Face directory that transformers and vLLM load: weights of `chunks`, the rest from `source_dir`.

    Collective over the TP group; only the rank with `write` touches the disk. Bit-equal to the model's parameters.
    """
    from prune_opd.weights.files import HfDirectoryWriter

    writer = HfDirectoryWriter(Path(out_dir), Path(source_dir), MAX_FILE_BYTES) if write else None
    for name, tensor in hf_stream(chunks):
        if writer:
            writer.add(name, tensor)
    if writer:
        writer.finish()
