"""One rank of test_files.py: load the good directory, then each broken one, and write what was raised.

worker_files.py OUT_FILE GOOD_DIR BROKEN_DIR…
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from prune_opd import platform
from prune_opd.config import ParallelConfig
from prune_opd.errors import ConfigError


def main(out: Path, good: str, *broken: str) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.model import build

    alone = layouts.initialize(ParallelConfig(tensor=1), machine, seed=0).student
    build(good, alone, torch.float32, trainable=False)
    raised: dict[str, str] = {}
    for directory in broken:
        try:
            build(directory, alone, torch.float32, trainable=False)
            raised[directory] = "nothing"
        except ConfigError as reason:
            raised[directory] = str(reason)
    out.write_text(json.dumps(raised))
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
