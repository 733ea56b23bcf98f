"""What the paper's five pairs share (Prune-OPD, arXiv 2605.07804, section 4 and appendix): one node of eight H100s.

64 prompts of DAPO-Math-17K × 4 responses a step, one update a step, 203 steps, AdamW at a constant 1e-6. Models lie in
$PRUNE_OPD_MODELS as OWNER/NAME (default: models), prompts and problems in $PRUNE_OPD_DATA (default: data), the prompts
as `prune-opd data convert dapo-math-17k` writes them. The four strategies are overrides; the constants that the papers
did not publish are ours and stand here:

    horizon.strategy=full gate=null      plain OPD
    horizon.strategy=topd                a quarter of the maximum, fixed (the paper also has horizon.rho=0.1)
    horizon.strategy=popd                from init_len, 512 tokens more every 8 steps
"""

from typing import Literal

from prune_opd.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    GateConfig,
    HorizonConfig,
    MemoryConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    PlanningConfig,
    PrecisionConfig,
    RolloutConfig,
    TrainConfig,
)
from prune_opd.config.paths import data_dir, models_dir

INSTRUCTION = " Please reason step by step, and put your final answer within \\boxed{}."


def paper_base(
    name: str,
    student: str,
    teacher: str,
    *,
    init_len: int,
    response_length: int,
    mean_horizon: int,
    thinking: bool | None = None,
    ends: Literal["as_is", "class"] = "as_is",
) -> TrainConfig:
    """init_len: the pair's first window. The next two are what the planner assumes of it (PlanningConfig). thinking:
    the switch of Qwen3's chat template; None for models whose template has none. ends: objective.ends."""
    return TrainConfig(
        name=name,
        student=str(models_dir() / student),
        teacher=str(models_dir() / teacher),
        steps=203,
        data=DataConfig(source=str(data_dir() / "dapo-math-17k.jsonl"), suffix=INSTRUCTION, thinking=thinking),
        rollout=RolloutConfig(prompts=64, responses=4, max_prompt_len=1024, gpu_memory_utilization=0.5),
        horizon=HorizonConfig(
            strategy="prune",
            max_len=12288,
            min_len=1024,
            init_len=init_len,
            rho=0.25,  # topd
            increment=512,  # popd, with interval and init_len: ours, the paper's are unpublished
            interval=8,
        ),
        gate=GateConfig(),  # the paper's: k = 16, γ = .7, w_drop = .01, w_base = .5
        objective=ObjectiveConfig(ends=ends),
        optimizer=OptimizerConfig(lr=1e-6, weight_decay=0.01, beta1=0.9, beta2=0.999, clip_grad=1.0),
        parallel=ParallelConfig(nproc=8, tensor=1, distributed_optimizer=True, recompute="full"),
        precision=PrecisionConfig(params="bf16"),
        memory=MemoryConfig(sleep_level=2, offload_gradients=True),  # their memory is the KV cache's meanwhile
        evaluation=EvalConfig(
            sources=(str(data_dir() / "aime24.jsonl"),), problems=30, samples=16, top_p=0.95, max_len=31744
        ),
        checkpoint=CheckpointConfig(every=50, any_layout="last"),
        planning=PlanningConfig(gpu="h100", nodes=1, response_length=response_length, mean_horizon=mean_horizon),
    )
