"""The contender `trl` of `prune-opd bench peers`: TRL's DistillationTrainer on our recipe's pair, prompts and settings.

Of TRL's on-policy distillation trainers (1.16.0) this is the one that its users take: stable, on-policy only, reverse
KL by default, a loss in chunks of hidden states. The older GKDTrainer says itself, when it is set to λ = 1 and T = 1,
that DistillationTrainer replaces it. Its vLLM mode cannot run on a CPU, so it generates with transformers.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import answer, rank, resident
from benchmarks.peers.memory import by_owner
from benchmarks.peers.ours import states
from benchmarks.peers.turns import Step, Turns
from prune_opd.config import OptimizerConfig, TrainConfig
from prune_opd.config.yaml import load_config
from prune_opd.errors import UserError


def learning_rate_factor(optimizer: OptimizerConfig, total: int, update: int) -> float:
    """lr of the `update`-th update (from 0) divided by optimizer.lr: megatron's linear schedule, for a LambdaLR."""
    step = update + 1
    if step <= optimizer.warmup_steps:
        return step / optimizer.warmup_steps
    left = max(total - step, 0) / (total - optimizer.warmup_steps)
    floor = optimizer.min_lr / optimizer.lr
    return floor + (1 - floor) * left


def train(folder: str, steps: int, save_at: list[int], threads: int) -> list[Step]:
    """All steps of `folder`/config.yaml; the students of the steps in `save_at` go to `folder`/hf-STEP."""
    import torch

    torch.set_num_threads(threads)
    home = Path(folder)
    config = load_config(home / "config.yaml")
    assert isinstance(config, TrainConfig)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.student, padding_side="left")
    from trl import DistillationTrainer  # type: ignore[import-not-found]  # noqa: F401  its imports are no model's memory

    imports = resident()
    trainer, turns = make_trainer(config, tokenizer, home, steps), Turns(home)
    trainer.add_callback(_taking_turns(trainer, turns, imports, home, save_at))
    trainer.train()
    return turns.steps


def make_trainer(config: TrainConfig, tokenizer: Any, folder: Path, steps: int) -> Any:
    """A DistillationTrainer that does what the recipe does at the full horizon, in fp32 and with no checkpointing."""
    import torch
    from trl import DistillationConfig, DistillationTrainer  # in .venv-bench

    optimizer = config.optimizer
    if optimizer.schedule != "linear":
        raise UserError(f"optimizer.schedule = {optimizer.schedule!r}: the TRL contender knows 'linear'")
    rows = config.rollout.prompts * config.rollout.responses // int(os.environ.get("WORLD_SIZE", "1"))
    arguments = DistillationConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        per_device_train_batch_size=rows,
        max_completion_length=config.horizon.max_len,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=0,
        beta=1.0,  # reverse KL
        learning_rate=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.eps,
        max_grad_norm=optimizer.clip_grad,
        shuffle_dataset=False,
        seed=config.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,  # TRL's default is on: memory for time
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )
    trainer = DistillationTrainer(
        model=config.student,
        teacher_model=config.teacher,
        args=arguments,
        train_dataset=prompt_rows(config, tokenizer, steps),
        processing_class=tokenizer,
    )
    trainer.create_optimizer()
    total = config.steps
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda update: learning_rate_factor(optimizer, total, update)
    )
    return trainer


def prompt_rows(config: TrainConfig, tokenizer: Any, steps: int) -> list[dict[str, str]]:
    """The prompts that our run draws, in its order, as text. Raises `UserError` if TRL would see other tokens.

    A list is dataset enough for TRL; a `datasets.Dataset` of this pin set cannot hash its own table.
    """
    from prune_opd.data.prompts import make_sampler

    sampler = make_sampler(config.data, tokenizer, config.seed, config.rollout.max_prompt_len)
    drawn = sampler.next(steps * config.rollout.prompts)
    prompts = [prompt for prompt in drawn for _ in range(config.rollout.responses)]
    texts = tokenizer.batch_decode([list(prompt.ids) for prompt in prompts])
    for prompt, ids in zip(prompts, tokenizer(texts)["input_ids"], strict=True):
        if tuple(ids) != prompt.ids:
            raise UserError(f"prompt {prompt.index} does not survive text: TRL would train on other tokens")
    return [{"prompt": text} for text in texts]


def owned(trainer: Any) -> dict[str, Any]:
    """Who owns which of a rank's tensors between two steps; the gradients are gone then."""
    student = [*trainer.model.parameters()]
    return {
        "student": student,
        "gradients": [weight.grad for weight in student if weight.grad is not None],
        "optimizer": states(getattr(trainer.optimizer, "optimizer", trainer.optimizer)),
        "teacher": [*trainer.teacher_model.parameters()],
    }


def _taking_turns(trainer: Any, turns: Turns, imports: int, folder: Path, save_at: list[int]) -> Any:
    """A callback that waits for each step's turn, times it from generation to the optimizer, and saves the student."""
    from transformers import TrainerCallback

    class TakingTurns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turns.begin(state.global_step + 1)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            masks = [batch["completion_mask"] for batch in trainer._buffered_inputs]
            owners = partial(by_owner, imports, owned(trainer))
            turns.end(state.global_step, owners, tokens=sum(int(mask.sum()) for mask in masks))  # this rank's
            if state.global_step in save_at and rank() == 0:
                out = folder / f"hf-{state.global_step}"
                trainer.accelerator.unwrap_model(trainer.model).save_pretrained(out)
                trainer.processing_class.save_pretrained(out)

    return TakingTurns()


if __name__ == "__main__":
    answer(train)
