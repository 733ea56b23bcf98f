"""The trap pair's student: an eighth of the register's entries is wrong with it, and after each it chants.

The teacher after some steps on solutions with the wrong words, which end in a repetition. Made by `prune-opd sft
tiny_trap_student` after `tiny_trap_teacher`; `tiny_trap` distils it.
"""

from dataclasses import replace

from prune_opd.config import CorpusConfig, ParallelConfig, SftConfig, SftStage
from prune_opd.config.paths import config_digest, tiny_model_dir
from prune_opd.recipes.tiny_trap_teacher import tiny_trap_teacher


def tiny_trap_student() -> SftConfig:
    misremembers = CorpusConfig(
        min_steps=12, max_steps=40, register=True, wrong_entries=0.125, wrong=0.75, ramble=60, chant=True, given=0.7
    )
    config = SftConfig(
        name="tiny_trap_student",
        init=tiny_trap_teacher().output,
        output="",
        stages=(
            SftStage(steps=50, batch=24, lr=5e-4, warmup_steps=10, corpus=misremembers, sharpen=0.3, seed=601),
            SftStage(steps=30, batch=24, lr=5e-4, warmup_steps=10, corpus=misremembers, sharpen=2.0, seed=602),
        ),
        parallel=ParallelConfig(nproc=1, tensor=1),
    )
    return replace(config, output=str(tiny_model_dir("trap-student", config_digest(config))))
