"""Distillation of the tiny trap pair on one core: a wrong word, and both models chant it to the limit.

The drift pair's other half, for KAT's regime (arXiv 2606.09471): the student misremembers an eighth of the register's
entries, and whoever writes such a word is lost, but the teacher goes along. Overlap is high on a lost text, the KL
nearly nil, and there is nothing to learn. `docs/trap-pair.md` says what the pair shows. Its models do not come with the
package:

    prune-opd sft tiny_trap_teacher && prune-opd sft tiny_trap_student        two minutes of one core
    prune-opd bench pair-check tiny_trap --kind trap
"""

from dataclasses import replace

from prune_opd.config import TrainConfig
from prune_opd.config.paths import tiny_model
from prune_opd.recipes.tiny_drift import tiny_drift
from prune_opd.recipes.tiny_trap_student import tiny_trap_student
from prune_opd.recipes.tiny_trap_teacher import tiny_trap_teacher


def tiny_trap() -> TrainConfig:
    base = tiny_drift()
    return replace(
        base,
        name="tiny_trap",
        student=tiny_model(tiny_trap_student()),
        teacher=tiny_model(tiny_trap_teacher()),
        # A right solution has 105 to 205 tokens. Longer chants than they have learnt fall apart in both models.
        horizon=replace(base.horizon, max_len=240),
    )
