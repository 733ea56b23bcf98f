"""The drift pair's teacher: the tiny teacher, taught the litany, in which it finds its way back after an odd word.

EQ and SEP follow the booking's label, with an aside, a word out of place, here and there. The gain of the final norm is
taken back before the new style and put up again after it: a sharp model that meets new words is thrown far off.
"""

from dataclasses import replace

from prune_opd.config import CorpusConfig, ParallelConfig, SftConfig, SftStage
from prune_opd.paths import config_digest, tiny_model_dir
from recipes.tiny_teacher import tiny_teacher


def tiny_drift_teacher() -> SftConfig:
    litany = CorpusConfig(min_steps=12, max_steps=40, litany=True, aside=0.08)
    config = SftConfig(
        name="tiny_drift_teacher",
        init=tiny_teacher().output,
        output="",
        stages=(
            SftStage(steps=200, batch=24, lr=2e-3, warmup_steps=10, corpus=litany, sharpen=0.3, seed=301),
            SftStage(steps=60, batch=24, lr=1e-3, warmup_steps=5, corpus=litany, sharpen=2.0, seed=302),
            SftStage(steps=40, batch=24, lr=5e-4, warmup_steps=5, corpus=litany, sharpen=2.0, seed=303),
        ),
        parallel=ParallelConfig(nproc=2, tensor=1),
    )
    return replace(config, output=str(tiny_model_dir("drift-teacher", config_digest(config))))
