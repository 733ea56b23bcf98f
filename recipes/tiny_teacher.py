"""The tiny teacher: the base on clean solutions, sharpened twice because a model trained for minutes is too flat.

Minutes of training leave a model that is right when greedy and wrong at temperature 1; scaling the gain of the final
norm before a stage sharpens its logits. Made by `prune-opd sft tiny_teacher` after `tiny_base`.
"""

from dataclasses import replace

from prune_opd.config import CorpusConfig, ParallelConfig, SftConfig, SftStage
from prune_opd.paths import config_digest, tiny_model_dir
from recipes.tiny_base import tiny_base


def tiny_teacher() -> SftConfig:
    clean = CorpusConfig(min_steps=12, max_steps=40, reverse=0.08)
    careless = replace(clean, slip=0.004, slip_result=0.03)
    config = SftConfig(
        name="tiny_teacher",
        init=tiny_base().output,
        output="",
        stages=(
            SftStage(steps=170, batch=24, lr=2.5e-3, warmup_steps=50, corpus=careless, seed=31),
            SftStage(steps=110, batch=24, lr=1.5e-3, warmup_steps=50, corpus=clean, seed=51),
            SftStage(steps=60, batch=24, lr=1e-3, warmup_steps=5, corpus=clean, sharpen=2.5, seed=71),
            SftStage(steps=75, batch=24, lr=1e-3, warmup_steps=5, corpus=clean, sharpen=2.5, seed=101),
        ),
        parallel=ParallelConfig(nproc=2, tensor=1),
    )
    return replace(config, output=str(tiny_model_dir("teacher", config_digest(config))))
