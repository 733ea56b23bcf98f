"""The tiny student: the teacher after 50 steps on solutions that often forget the carry.

A systematic error that the teacher does not make: at a tens boundary the old tens digit stays with probability .12.
It is the student of the *compatible* pair, which `tiny_compatible` distils. Made by `prune-opd sft tiny_student`.
"""

from dataclasses import replace

from prune_opd.config import CorpusConfig, ParallelConfig, SftConfig, SftStage
from prune_opd.config.paths import config_digest, tiny_model_dir
from prune_opd.recipes.tiny_teacher import tiny_teacher


def tiny_student() -> SftConfig:
    forgets_the_carry = CorpusConfig(
        min_steps=12, max_steps=40, reverse=0.08, slip=0.001, slip_result=0.002, carry_bug=0.12
    )
    config = SftConfig(
        name="tiny_student",
        init=tiny_teacher().output,
        output="",
        stages=(SftStage(steps=50, batch=24, lr=1e-3, warmup_steps=5, corpus=forgets_the_carry, seed=201),),
        parallel=ParallelConfig(nproc=2, tensor=1),
    )
    return replace(config, output=str(tiny_model_dir("student", config_digest(config))))
