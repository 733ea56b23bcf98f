"""The rank of test_real_pair.py: megatron-core's logits of model directories beside those of transformers.

    torchrun … worker_real_logits.py FILE RESULT DIRECTORY …

FILE has the rows, and for each directory the logits that transformers computed. RESULT: the differences, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from prune_opd import platform
from prune_opd.config import ParallelConfig
from tests.distributed.worker_model_parity import compare


@torch.no_grad()
def main(file: Path, result: Path, directories: list[str]) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.model import build

    layouts.initialize(ParallelConfig(tensor=1), machine, seed=0)
    layout = layouts.arrange(ParallelConfig(tensor=1), seed=0).student
    rows, expected = torch.load(file)
    found = {
        name: compare(build(name, layout, torch.float32, trainable=False), expected[name], rows, layout, machine.device)
        for name in directories
    }
    result.write_text(json.dumps(found), encoding="utf-8")
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
