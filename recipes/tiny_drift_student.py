"""The drift pair's student: an eighth of the register's entries is wrong with it, and each of those loses the text.

The teacher after some steps on solutions with the wrong words, which end there: that a lost text is noise it has from
the teacher. Made by `prune-opd sft tiny_drift_student`; `tiny_drift` distils it.
"""

from dataclasses import replace

from prune_opd.config import CorpusConfig, ParallelConfig, SftConfig, SftStage
from prune_opd.config.paths import config_digest, tiny_model_dir
from prune_opd.recipes.tiny_drift_teacher import tiny_drift_teacher


def tiny_drift_student() -> SftConfig:
    misremembers = CorpusConfig(
        min_steps=12, max_steps=40, register=True, wrong_entries=0.125, wrong=0.75, ramble=60, given=0.7
    )
    config = SftConfig(
        name="tiny_drift_student",
        init=tiny_drift_teacher().output,
        output="",
        stages=(
            SftStage(steps=50, batch=24, lr=5e-4, warmup_steps=10, corpus=misremembers, sharpen=0.3, seed=401),
            SftStage(steps=30, batch=24, lr=5e-4, warmup_steps=10, corpus=misremembers, sharpen=2.0, seed=402),
        ),
        parallel=ParallelConfig(nproc=2, tensor=1),
    )
    return replace(config, output=str(tiny_model_dir("drift-student", config_digest(config))))
