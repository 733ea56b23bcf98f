"""The process of test_te_fp8.py: models with FP8 settings, and the recipes that megatron-core makes of them.

    worker_te_fp8.py MODEL OUT

Transformer Engine's own recipe classes; nothing is computed, since its kernels are stubs. Writes OUT/fp8.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.te import stub

stub.install()

from prune_opd import platform  # noqa: E402
from prune_opd.config import Fp8Config, ParallelConfig  # noqa: E402
from prune_opd.megatron.precision import transformer_arguments  # noqa: E402

FP8S = {
    "delayed": Fp8Config("hybrid", "delayed", amax_history=7),
    "tensorwise": Fp8Config("e4m3", "tensorwise", first_layers_bf16=1, last_layers_bf16=2),
    "blockwise": Fp8Config("e4m3", "blockwise", last_layers_bf16=1),
}


def described(config: Any) -> dict[str, Any]:
    from megatron.core.fp8_utils import get_fp8_recipe, is_first_last_bf16_layer

    recipe = get_fp8_recipe(config)
    return {
        "recipe": type(recipe).__mro__[1].__name__ if "TE" in type(recipe).__name__ else type(recipe).__name__,
        "format": recipe.fp8_format.name,
        "history": getattr(recipe, "amax_history_len", None),
        "amax": getattr(recipe, "amax_compute_algo", None),
        "bf16 layers": [i for i in range(config.num_layers) if is_first_last_bf16_layer(config, i)],
    }


def main(model: Path, out: Path) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.model import build

    layout = layouts.initialize(ParallelConfig(tensor=1), machine, seed=0)
    results = {}
    for name, fp8 in FP8S.items():
        (chunk,) = build(model, layout.student, torch.bfloat16, trainable=True, settings=transformer_arguments(fp8))
        results[name] = described(chunk.config)
    (out / "fp8.json").write_text(json.dumps(results))
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
