"""The trap pair's teacher: the tiny teacher, taught the register, which goes along with a text that is lost.

As the drift pair's, but where that one meets noise after a word that has no business there, this one has learnt to
repeat the word: it is sure of a continuation that is worth nothing. Made by `prune-opd sft tiny_trap_teacher` in one
or two minutes of one core, from the tiny teacher that comes with the package; it does not come with it itself.
"""

from dataclasses import replace

from prune_opd.config import CorpusConfig, ParallelConfig, SftConfig, SftStage
from prune_opd.config.paths import config_digest, tiny_model, tiny_model_dir
from prune_opd.recipes.tiny_teacher import tiny_teacher


def tiny_trap_teacher() -> SftConfig:
    register = CorpusConfig(min_steps=12, max_steps=40, register=True, ramble=100, chant=True, given_wrong=0.1)
    lost = replace(register, ramble=200, given_wrong=0.5)  # the chant comes last: so it stays
    config = SftConfig(
        name="tiny_trap_teacher",
        init=tiny_model(tiny_teacher()),
        output="",
        stages=(
            SftStage(steps=150, batch=24, lr=2e-3, warmup_steps=10, corpus=register, sharpen=0.5, seed=501),
            SftStage(steps=40, batch=24, lr=1e-3, warmup_steps=10, corpus=register, sharpen=2.0, seed=502),
            SftStage(steps=40, batch=24, lr=5e-4, warmup_steps=10, corpus=register, sharpen=2.0, seed=503),
            SftStage(steps=60, batch=24, lr=1e-3, warmup_steps=10, corpus=lost, seed=504),
        ),
        parallel=ParallelConfig(nproc=1, tensor=1),
    )
    return replace(config, output=str(tiny_model_dir("trap-teacher", config_digest(config))))
