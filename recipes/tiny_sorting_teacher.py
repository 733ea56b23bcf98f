"""The second teacher of `tiny_two_teachers`: it sorts numbers, a reasoning-gym task in the tiny models' words.

The tiny teacher that comes with the package, taught number_sorting (data/gym_words.py) until it has nothing of the
ledger left: neither teacher can do the other's task. Made by `prune-opd sft tiny_sorting_teacher` in one or two minutes
of one core; it does not come with the package.
"""

from dataclasses import replace

from prune_opd.config import CorpusConfig, ParallelConfig, SftConfig, SftStage
from prune_opd.config.paths import config_digest, tiny_model, tiny_model_dir
from prune_opd.recipes.tiny_teacher import tiny_teacher


def tiny_sorting_teacher() -> SftConfig:
    sorting = CorpusConfig(sorting=1.0)
    config = SftConfig(
        name="tiny_sorting_teacher",
        init=tiny_model(tiny_teacher()),
        output="",
        stages=(
            SftStage(steps=900, batch=64, lr=3e-3, warmup_steps=30, corpus=sorting, sharpen=0.2, seed=701),
            SftStage(steps=60, batch=64, lr=1e-3, warmup_steps=10, corpus=sorting, sharpen=2.0, seed=702),
            SftStage(steps=60, batch=64, lr=5e-4, warmup_steps=10, corpus=sorting, sharpen=2.0, seed=703),
        ),
        parallel=ParallelConfig(nproc=1, tensor=1),
    )
    return replace(config, output=str(tiny_model_dir("sorting-teacher", config_digest(config))))
