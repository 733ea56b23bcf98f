"""What the large pairs share beyond the papers' settings: FP8 in both models and in rollouts, longer first windows."""

from dataclasses import replace

from prune_opd.config import Fp8Config, PrecisionConfig, TrainConfig
from recipes._paper import paper_base

FP8 = Fp8Config(format="hybrid", recipe="blockwise", first_layers_bf16=1, last_layers_bf16=1)


def large_base(name: str, student: str, teacher: str, *, nodes: int) -> TrainConfig:
    base = paper_base(name, student, teacher, init_len=2048, response_length=7500, mean_horizon=6144)
    return replace(
        base,
        rollout=replace(base.rollout, quantization="fp8"),
        precision=PrecisionConfig(params="bf16", student_fp8=FP8, teacher_fp8=FP8),
        planning=replace(base.planning, nodes=nodes),
    )
