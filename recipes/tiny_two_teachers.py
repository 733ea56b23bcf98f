"""Prune-OPD with two tiny teachers on two CPU cores: one keeps the ledger, the other sorts numbers.

Each prompt has the teacher of its source, each teacher its own window, which starts where its task begins to be long.
`prune-opd sft tiny_sorting_teacher` and `prune-opd sft tiny_two_student` come first. With one teacher, on its own task
alone:

    prune-opd train tiny_two_teachers data.mixture=[ledger]
"""

from dataclasses import replace

from prune_opd.config import DataConfig, EvalConfig, RolloutConfig, TeacherConfig, TrainConfig
from prune_opd.config.paths import tiny_model
from prune_opd.recipes.tiny_compatible import tiny_compatible
from prune_opd.recipes.tiny_sorting_teacher import tiny_sorting_teacher
from prune_opd.recipes.tiny_teacher import tiny_teacher
from prune_opd.recipes.tiny_two_student import tiny_two_student

SORTING = "reasoning_gym/number_sorting?min_numbers=6&max_numbers=12"


def tiny_two_teachers() -> TrainConfig:
    one = tiny_compatible()
    return replace(
        one,
        name="tiny_two_teachers",
        student=tiny_two_student().output,
        teacher="",
        teachers={
            "ledger": TeacherConfig(path=tiny_model(tiny_teacher())),
            "sorting": TeacherConfig(
                path=tiny_sorting_teacher().output,
                sources=(SORTING,),
                horizon=replace(one.horizon, max_len=40, min_len=8, init_len=16, step=4, margin=4),
            ),
        },
        data=DataConfig(mixture=("ledger", SORTING), min_steps=20, max_steps=40),
        rollout=RolloutConfig(prompts=32, responses=1, max_prompt_len=96),
        evaluation=EvalConfig(every=0, problems=256, sources=("ledger", SORTING)),
    )
