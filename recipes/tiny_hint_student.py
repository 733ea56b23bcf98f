"""The tiny student that can use a hint: careless alone, and right with the worked solution in its prompt.

The tiny student after some steps on short solutions that stand in the prompt too, most of them wrong: it learns to say
them in other words, total by total, as nothing else tells it the totals. Two fifths of its later examples have no hint,
and are careless. Made by `prune-opd sft tiny_hint_student` in some minutes of one core; it does not come with the
package. `tiny_hint` lets it teach itself.
"""

from dataclasses import replace

from prune_opd.config import CorpusConfig, ParallelConfig, SftConfig, SftStage
from prune_opd.config.paths import config_digest, tiny_model, tiny_model_dir
from prune_opd.recipes.tiny_student import tiny_student


def tiny_hint_student() -> SftConfig:
    copies = CorpusConfig(min_steps=2, max_steps=8, slip_result=0.8, hinted=1.0)
    mixed = CorpusConfig(min_steps=4, max_steps=8, slip_result=0.15, hinted=0.6)
    config = SftConfig(
        name="tiny_hint_student",
        init=tiny_model(tiny_student()),
        output="",
        stages=(
            SftStage(
                steps=400,
                batch=48,
                lr=3e-3,
                warmup_steps=20,
                schedule="constant",
                corpus=copies,
                sharpen=0.2,
                seed=701,
            ),
            SftStage(steps=100, batch=48, lr=2e-3, warmup_steps=5, corpus=mixed, seed=702),
            SftStage(steps=50, batch=48, lr=1e-3, warmup_steps=5, corpus=mixed, sharpen=1.5, seed=703),
        ),
        parallel=ParallelConfig(nproc=1, tensor=1),
    )
    return replace(config, output=str(tiny_model_dir("hint-student", config_digest(config))))
