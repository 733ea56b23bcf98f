"""Ranks of test_model_parity.py: megatron-core's logits of every model against those that transformers computed.

    torchrun … worker_model_parity.py FOLDER TP

FOLDER/<case>/ is a model directory, FOLDER/expected.pt the rows and their logits. Writes rank<r>.json (largest errors
by case) and, from rank 0, the exported directory FOLDER/<case>.tp<TP>.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from prune_opd import platform
from prune_opd.config import ParallelConfig
from prune_opd.weights.stream import export_hf, hf_stream


def logits_of(model: Any, batch: Any, layout: Any) -> Tensor:
    """Whole logits [N, V] without the padded vocabulary: every rank's columns, side by side."""
    local_NV = model(batch) @ model.head_weight().T
    parts = [local_NV]
    if layout.tp_group is not None:
        parts = [torch.empty_like(local_NV) for _ in range(layout.student.tp)]
        dist.all_gather(parts, local_NV.contiguous(), group=layout.tp_group)
    return torch.cat(parts, dim=1)[:, : model.spec.vocab_size]


def check(directory: Path, expected: list[Tensor], rows: dict[str, Any], layout: Any, device: Any) -> dict[str, Any]:
    from prune_opd.megatron.model import build
    from prune_opd.megatron.packing import pack

    (model,) = build(directory, layout.student, torch.float32, trainable=False)
    everything = range(len(rows["prompts"]))
    (packed,) = pack(rows["prompts"], rows["responses"], everything, 10_000, device)
    alone = pack(rows["prompts"], rows["responses"], everything, 1, device)
    packed_NV = logits_of(model, packed, layout)
    alone_NV = torch.cat([logits_of(model, batch, layout) for batch in alone])
    bounds = packed.cu_seqlens.tolist()
    assert bounds[-1] == len(packed_NV) == sum(len(row) for row in expected)

    on_disk = load_file(directory / "model.safetensors")
    streamed = dict(hf_stream([model]))
    out = directory.with_name(f"{directory.name}.tp{layout.student.tp}")
    export_hf([model], directory, out, write=layout.is_main)
    return {
        "transformers": (packed_NV - torch.cat(expected)).abs().max().item(),
        "alone": (packed_NV - alone_NV).abs().max().item(),
        "logits": packed_NV.abs().max().item(),
        "streamed": streamed.keys() == on_disk.keys() and all(torch.equal(streamed[x], on_disk[x]) for x in on_disk),
    }


@torch.no_grad()
def main(folder: Path, tensor_parallel: int) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts

    layout = layouts.initialize(ParallelConfig(tensor=tensor_parallel), machine, seed=0)
    rows, expected = torch.load(folder / "expected.pt")
    results = {
        case: check(folder / case, logits, rows, layout, machine.device) for case, logits in sorted(expected.items())
    }
    (folder / f"rank{layout.rank}.json").write_text(json.dumps(results))
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
