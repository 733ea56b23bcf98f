"""A real pretrained pair on two CPU cores: SmolLM2-135M-Instruct teaches a copy of itself that lost two layers.

    make real-pair                      makes the pair and its prompts in the per-user cache
    prune-opd train real_pair
    prune-opd bench judge RUN/hf        what the student is worth, by transformers alone (docs/real-pair.md)

Unlike the tiny pairs it has a real vocabulary, 49152 tokens, of which 16 hold far from all the mass.
"""

from prune_opd.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    GateConfig,
    HorizonConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    TrainConfig,
)
from prune_opd.config.paths import real_pair_dir


def real_pair() -> TrainConfig:
    pair = real_pair_dir()
    return TrainConfig(
        name="real_pair",
        student=str(pair / "student"),
        teacher=str(pair / "teacher"),
        steps=80,
        data=DataConfig(
            mixture=tuple(str(pair / "data" / f"{name}_train.jsonl") for name in ("chat", "arithmetic")), weights=(1, 1)
        ),
        rollout=RolloutConfig(prompts=16, responses=1, max_prompt_len=96, kv_cache_gb=0.5),
        horizon=HorizonConfig(strategy="prune", max_len=64, min_len=16, init_len=32, step=16, margin=8, patience=2),
        # Ours, the same on every pair: the paper's γ would call nearly every token of such a student an event.
        gate=GateConfig("change_point", w_drop=0.2, w_base=0.0),
        # The published form would leak (docs/objectives.md).
        objective=ObjectiveConfig(name="full_vocab_reverse_kl"),
        optimizer=OptimizerConfig(lr=1e-4, min_lr=1e-5, schedule="linear", warmup_steps=3, beta2=0.99, clip_grad=1.0),
        # 9 and 3 heads: two ranks cannot share a layer, so each has the whole models and half of the prompts.
        parallel=ParallelConfig(nproc=2, tensor=1, microbatch_tokens=1024, loss_chunk_tokens=256),
        precision=PrecisionConfig(params="fp32"),
        evaluation=EvalConfig(problems=0),
        checkpoint=CheckpointConfig(every=20),
    )
