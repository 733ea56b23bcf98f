"""Ranks of test_layout_builds.py: which parameters each rank of a layout holds, and whether they are the right ones.

    torchrun … worker_layout_builds.py MODELS OUT

Writes OUT/<layout>.json from rank 0: of every rank and model, its parameters' names, and those that are wrong.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prune_opd import platform
from prune_opd.config import ParallelConfig

LAYOUTS = {
    2: {
        "tp2": ParallelConfig(tensor=2),
        "pp2": ParallelConfig(tensor=1, pipeline=2),
        "pp2 vpp2": ParallelConfig(tensor=1, pipeline=2, virtual_pipeline=2),
    },
}
MODELS = ("tied", "untied")


def check(directory: Path, layout: Any) -> dict[str, Any]:
    """The names of this rank's parameters, and of those that are not the right part of the directory's tensors."""
    from prune_opd.megatron.model import build
    from prune_opd.weights.load import SafetensorsDirectory, read_shard
    from prune_opd.weights.mapping import entries, local_parameters

    chunks = build(directory, layout, torch.float32, trainable=True)
    files, spec = SafetensorsDirectory(directory), chunks[0].spec
    local = local_parameters(chunks)
    assert len(local) == sum(len(list(chunk.parameters())) for chunk in chunks)
    wrong = []
    for entry in entries(spec):
        if entry.megatron in local:
            expected = read_shard(entry, files, *entry.shard_of(layout.groups))
            if not torch.equal(local[entry.megatron], expected):
                wrong.append(entry.megatron)
    return {
        "names": list(local),
        "layers": [[layer.layer_number - 1 for layer in chunk.decoder.layers] for chunk in chunks],
        "wrong": wrong,
        "all": [entry.megatron for entry in entries(spec)],
    }


def main(models: Path, out: Path) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts

    world = layouts.initialize(ParallelConfig(tensor=1), machine, seed=0).world
    for name, parallel in LAYOUTS[world].items():
        layout = layouts.arrange(parallel, seed=0)
        found = {model: check(models / model, layout.student) for model in MODELS}
        everyone: list[Any] = [None] * layout.world
        dist.all_gather_object(everyone, found)
        if layout.is_main:
            (out / f"{name}.json").write_text(json.dumps(everyone))
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
