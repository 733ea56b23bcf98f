"""The student of `tiny_two_teachers`: the tiny student, which has also begun to learn to sort numbers.

It forgets carries in the ledger, and has seen too few sorted lists to be sure of them. Made by `prune-opd sft
tiny_two_student` in some minutes of one core; it does not come with the package.
"""

from dataclasses import replace

from prune_opd.config import CorpusConfig, ParallelConfig, SftConfig, SftStage
from prune_opd.config.paths import config_digest, tiny_model, tiny_model_dir
from prune_opd.recipes.tiny_student import tiny_student


def tiny_two_student() -> SftConfig:
    both = CorpusConfig(
        min_steps=12, max_steps=40, reverse=0.08, slip=0.001, slip_result=0.002, carry_bug=0.12, sorting=0.8
    )
    config = SftConfig(
        name="tiny_two_student",
        init=tiny_model(tiny_student()),
        output="",
        stages=(
            SftStage(steps=550, batch=48, lr=3e-3, warmup_steps=30, corpus=both, sharpen=0.2, seed=801),
            SftStage(steps=50, batch=48, lr=1e-3, warmup_steps=10, corpus=both, sharpen=2.0, seed=802),
        ),
        parallel=ParallelConfig(nproc=1, tensor=1),
    )
    return replace(config, output=str(tiny_model_dir("two-student", config_digest(config))))
