"""The drift pair's teacher: the tiny teacher, taught the register, with nothing to say about a text that is lost.

The word after a total follows a table of 80 entries, one for each label and sign. In a tenth of the examples the given
text ends with a word that has no business there, and what there is to learn is noise. The gain of the final norm is
taken back before the new style and put up again after it: a sharp model that meets new words is thrown far off.
"""

from dataclasses import replace

from prune_opd.config import CorpusConfig, ParallelConfig, SftConfig, SftStage
from prune_opd.config.paths import config_digest, tiny_model_dir
from prune_opd.recipes.tiny_teacher import tiny_teacher


def tiny_drift_teacher() -> SftConfig:
    register = CorpusConfig(min_steps=12, max_steps=40, register=True, ramble=100, given_wrong=0.1)
    config = SftConfig(
        name="tiny_drift_teacher",
        init=tiny_teacher().output,
        output="",
        stages=(
            SftStage(steps=150, batch=24, lr=2e-3, warmup_steps=10, corpus=register, sharpen=0.5, seed=301),
            SftStage(steps=40, batch=24, lr=1e-3, warmup_steps=10, corpus=register, sharpen=2.0, seed=302),
            SftStage(steps=40, batch=24, lr=5e-4, warmup_steps=10, corpus=register, sharpen=2.0, seed=303),
        ),
        parallel=ParallelConfig(nproc=2, tensor=1),
    )
    return replace(config, output=str(tiny_model_dir("drift-teacher", config_digest(config))))
