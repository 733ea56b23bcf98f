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


def described(chunk: Any) -> dict[str, Any]:
    from megatron.core.fp8_utils import get_fp8_recipe, is_first_last_bf16_layer

    from prune_opd.megatron.shards import EXTRA_STATE, sharded_model

    config = chunk.config
    linears = [module for module in chunk.modules() if hasattr(module, "disable_parameter_transpose_cache")]
    recipe = get_fp8_recipe(config)
    return {
        "recipe": type(recipe).__mro__[1].__name__ if "TE" in type(recipe).__name__ else type(recipe).__name__,
        "format": recipe.fp8_format.name,
        "history": getattr(recipe, "amax_history_len", None),
        "amax": getattr(recipe, "amax_compute_algo", None),
        "keeps FP8 copies": [not linear.disable_parameter_transpose_cache for linear in linears],
        "pickled in a checkpoint": sum(EXTRA_STATE in name for name in sharded_model(chunk)),
        "fused": [config.apply_rope_fusion, config.bias_activation_fusion, config.moe_permute_fusion],
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
        results[name] = described(chunk)
    (out / "fp8.json").write_text(json.dumps(results))
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
