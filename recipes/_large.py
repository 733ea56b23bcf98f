"""What the large pairs share beyond the papers' settings: FP8 in both models and in rollouts, longer first windows.

They are the project's own, so the in-flight gate is on: the teacher looks at 1024, 2048, 4096 … tokens, where that paid
in the last batches. Evaluations take the last number of a response that boxes none.
"""

from dataclasses import replace

from prune_opd.config import Fp8Config, InflightConfig, PrecisionConfig, TrainConfig
from prune_opd.recipes._paper import paper_base

INFLIGHT = InflightConfig(mode="gate", first_check=1024, price=0.25)
FP8 = Fp8Config(format="hybrid", recipe="blockwise", first_layers_bf16=1, last_layers_bf16=1)


def large_base(name: str, student: str, teacher: str, *, nodes: int) -> TrainConfig:
    base = paper_base(name, student, teacher, init_len=2048, response_length=7500, mean_horizon=6144)
    return replace(
        base,
        rollout=replace(base.rollout, quantization="fp8_per_block", inflight=INFLIGHT),
        precision=PrecisionConfig(params="bf16", student_fp8=FP8, teacher_fp8=FP8),
        evaluation=replace(base.evaluation, extract="box_or_last_number"),
        planning=replace(base.planning, nodes=nodes),
    )
