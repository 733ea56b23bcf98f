"""The drift pair's student: it loses the litany with its first odd word, for good, and forgets carries.

The teacher after some steps on such solutions. Made by `prune-opd sft tiny_drift_student`; `tiny_drift` distils it.
"""

from dataclasses import replace

from prune_opd.config import CorpusConfig, ParallelConfig, SftConfig, SftStage
from prune_opd.paths import config_digest, tiny_model_dir
from recipes.tiny_drift_teacher import tiny_drift_teacher


def tiny_drift_student() -> SftConfig:
    loses_its_way = CorpusConfig(
        min_steps=12,
        max_steps=40,
        slip=0.001,
        slip_result=0.002,
        carry_bug=0.12,
        litany=True,
        aside=0.06,
        never_back=0.9,
    )
    config = SftConfig(
        name="tiny_drift_student",
        init=tiny_drift_teacher().output,
        output="",
        stages=(
            SftStage(steps=150, batch=24, lr=1.5e-3, warmup_steps=10, corpus=loses_its_way, sharpen=0.5, seed=401),
        ),
        parallel=ParallelConfig(nproc=2, tensor=1),
    )
    return replace(config, output=str(tiny_model_dir("drift-student", config_digest(config))))
