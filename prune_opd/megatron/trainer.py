"""The trained model: megatron-core's DDP, optimizer, schedule and forward-backward around one loss function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from prune_opd.config import Fp8Config, LoraConfig, OptimizerConfig, ParallelConfig
from prune_opd.config.lora import NO_LORA
from prune_opd.megatron import lora as adapters
from prune_opd.megatron import optimizer_state
from prune_opd.megatron.average import MovingAverage
from prune_opd.megatron.counted import counted
from prune_opd.megatron.layout import Layout
from prune_opd.megatron.model import HiddenStatesGPT, build
from prune_opd.megatron.packing import PackedBatch
from prune_opd.megatron.precision import NO_FP8, ddp_arguments, optimizer_arguments, transformer_arguments
from prune_opd.megatron.schedule import forward, forward_backward
from prune_opd.megatron.shards import load_model, sharded_model
from prune_opd.model_spec import ModelSpec
from prune_opd.rollout.batch import Rollouts

# (model, batch, hidden_NH of all its tokens) -> (loss summed over its tokens, number of tokens)
LossFunction = Callable[[HiddenStatesGPT, PackedBatch, Tensor], tuple[Tensor, int]]

# TransformerConfig's settings of each `parallel.recompute`: the core attention, or every layer from its input.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


@dataclass(frozen=True)
class Tuning:
    """How the student's layers compute, and what of them is trained: the adapters of `lora`, or every weight.

    seed: of the adapters' first values.
    """

    fp8: Fp8Config = NO_FP8
    lora: LoraConfig = NO_LORA
    seed: int = 0


WHOLE_MODEL = Tuning()


@dataclass(frozen=True)
class NotFinite:
    """Where an update went wrong: a NaN or an infinity on one rank, before it is summed up over the others."""

    rank: int
    what: str  # loss | gradient
    rows: tuple[int, ...]  # of the batch: those of the rank's first bad micro-batch, or all that the rank trained on

    def describe(self, rollouts: Rollouts) -> str:
        prompts = ", ".join(str(i) for i in dict.fromkeys(rollouts.prompts[row].index for row in self.rows))
        return f"the {self.what} is not finite on rank {self.rank} (batch rows {_runs(self.rows)}; prompts {prompts})"


@dataclass(frozen=True)
class StepResult:
    loss: float  # global token mean
    tokens: int  # in the global batch
    grad_norm: float  # before clipping
    lr: float
    updates: int = 1  # that were made
    skipped: tuple[tuple[NotFinite, ...], ...] = ()  # why, for each update that was not made

    def record(self) -> dict[str, float]:
        """The trainer's part of a step record."""
        return {"tokens_trained": self.tokens, "loss": self.loss, "grad_norm": self.grad_norm, "lr": self.lr}


class Trainer:
    """Owns the student's parameters, gradients and optimizer state; with adapters the last two are theirs alone.

    The learning rate of step s (1-based) is the schedule's value at s: a warm-up of w steps reaches lr at step w, and
    the decay reaches min_lr at step `total_steps`. A step is one update, or one of each minibatch.
    """

    def __init__(
        self,
        model_dir: str | Path,
        optimizer: OptimizerConfig,
        parallel: ParallelConfig,
        total_steps: int,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        tuning: Tuning = WHOLE_MODEL,
    ):
        self.layout, self.device, self.lora, fp8 = layout, device, tuning.lora, tuning.fp8
        settings = {**RECOMPUTE[parallel.recompute], **transformer_arguments(fp8)}
        fused = not self.lora.on
        chunks = build(model_dir, layout.student, dtype, trainable=True, fused_norms=fused, settings=settings)
        self.chunks = [chunk.to(device) for chunk in chunks]
        if self.lora.on:
            adapters.attach(self.chunks, self.lora, tuning.seed)
        config = self.chunks[0].config
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=parallel.distributed_optimizer,
            **ddp_arguments(fp8),
        )
        self.ddp = [DistributedDataParallel(config, ddp_config, chunk) for chunk in self.chunks]
        for chunk in self.ddp:
            chunk.broadcast_params()
        self.optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=optimizer.lr,
                min_lr=optimizer.min_lr,
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.beta1,
                adam_beta2=optimizer.beta2,
                adam_eps=optimizer.eps,
                clip_grad=optimizer.clip_grad,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=parallel.distributed_optimizer,
                **optimizer_arguments(fp8),
            ),
            self.ddp,
        )
        self.schedule = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            lr_warmup_steps=optimizer.warmup_steps,
            lr_decay_steps=max(total_steps, optimizer.warmup_steps + 1),
            lr_decay_style=optimizer.schedule,
            start_wd=optimizer.weight_decay,
            end_wd=optimizer.weight_decay,
            wd_incr_steps=total_steps,
            wd_incr_style="constant",
        )
        config.finalize_model_grads_func = self._finalize_grads
        self.average: MovingAverage | None = None  # of the student, that it learns from
        self._broken_gradient = torch.zeros((), dtype=torch.bool, device=device)
        config.grad_scale_func = self.optimizer.scale_loss

    def step(self, batches: Sequence[PackedBatch], loss: LossFunction) -> StepResult:
        """One update from this DP rank's micro-batches; the loss is one token mean over all ranks' tokens."""
        return self.step_through([batches], loss)

    def step_through(self, minibatches: Sequence[Sequence[PackedBatch]], loss: LossFunction) -> StepResult:
        """One update from each minibatch, all at the step's learning rate: the schedule counts steps.

        Loss and tokens are those of the whole, the gradient norm is the mean of the updates'. An update whose loss or
        gradient is not finite on any rank is left out on all of them: weights and optimizer stay as they are.
        """
        self.schedule.step(increment=1)
        updates = [self._update(batches, loss) for batches in minibatches]
        if len(updates) == 1:
            return updates[0]
        made = [update for update in updates if update.updates] or updates
        tokens = sum(update.tokens for update in updates)
        return StepResult(
            loss=sum(update.loss * update.tokens for update in made) / max(sum(update.tokens for update in made), 1),
            tokens=tokens,
            grad_norm=sum(update.grad_norm for update in made) / len(made),
            lr=updates[0].lr,
            updates=sum(update.updates for update in updates),
            skipped=tuple(reason for update in updates for reason in update.skipped),
        )

    @property
    def spec(self) -> ModelSpec:
        return self.chunks[0].spec

    @torch.no_grad()
    def weight_norm(self) -> float:
        """Euclidean norm of all parameters that are trained, as they are: fp32 products summed up in fp64.

        Each counts once, wherever it lies and however often. Collective: every rank calls it and gets the same.
        """
        parameters = (p for chunk in self.chunks for p in chunk.parameters() if p.requires_grad)
        square = torch.zeros((), dtype=torch.float64, device=self.device)
        for parameter in counted(parameters, self.layout.student.groups):
            square += torch.linalg.vector_norm(parameter, dtype=torch.float32).double().square()
        dist.all_reduce(square)
        return float(square.sqrt())

    def look(self, batches: Sequence[PackedBatch], loss: LossFunction) -> None:
        """The loss of the student as it is, for what the loss function notes down."""
        forward(self.chunks, self.layout.student, batches, partial(loss, self.chunks[-1]))

    def _update(self, batches: Sequence[PackedBatch], loss: LossFunction) -> StepResult:
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = forward_backward(self.ddp, self.layout.student, batches, partial(_forward_step, loss))
        # Whether each micro-batch's loss (none but on the last stage) and the gradient are broken on this rank.
        broken = torch.stack([*(~report[0].isfinite() for report in reports), self._broken_gradient])
        total = torch.zeros(3, dtype=torch.float64, device=self.device)
        if self.layout.counts:
            total[:2] = torch.stack(reports).sum(0)
        total[2] = broken.any()
        dist.all_reduce(total)
        loss_sum, tokens, problems = total.tolist()  # here the host waits for the device: once an update
        loss_mean, lr = loss_sum / max(tokens, 1), self.optimizer.param_groups[0]["lr"]
        if problems:
            everyone: list[Any] = [None] * self.layout.world
            dist.all_gather_object(everyone, self._not_finite(batches, broken.tolist()))
            reasons = tuple(reason for reason in everyone if reason)
            return StepResult(loss_mean, int(tokens), math.nan, lr, updates=0, skipped=(reasons,))
        _, grad_norm, _ = self.optimizer.step()
        return StepResult(loss_mean, int(tokens), float(grad_norm), lr)

    def _finalize_grads(self, *args: Any, **kwargs: Any) -> None:
        """megatron-core's reduction of the gradients, and before it a look at this rank's own."""
        buffers = [buffer for chunk in self.ddp for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        largest = torch.stack([torch.linalg.vector_norm(buffer.grad_data, torch.inf) for buffer in buffers])
        self._broken_gradient = ~largest.isfinite().all()
        finalize_model_grads(*args, **kwargs)

    def _not_finite(self, batches: Sequence[PackedBatch], broken: Sequence[bool]) -> NotFinite | None:
        """What is wrong on this rank. The loss says in which micro-batch; the gradient is that of all of them."""
        rank, (*losses, gradient) = self.layout.rank, broken
        for batch, is_broken in zip(batches, losses, strict=False):  # no losses but on the last stage
            if is_broken:
                return NotFinite(rank, "loss", tuple(batch.rows))
        if gradient:
            return NotFinite(rank, "gradient", tuple(row for batch in batches for row in batch.rows))
        return None

    def sharded_state(self, *, loading: bool, any_layout: bool = True) -> dict[str, Any]:
        """Model and optimizer for megatron's distributed checkpoint, in whatever layout this run has.

        With adapters they are all there is of the model. any_layout: whether every layout can load it, or only this one
        (optimizer_state.py).
        """
        metadata = {**optimizer_state.CHECKPOINT_FORMATS[any_layout], "dp_cp_group": self.layout.student.groups.dp_cp}
        if loading:
            optimizer_state.prepare_to_load(self.optimizer)
        shards = adapters.sharded_adapters if self.lora.on else sharded_model
        models = {f"model{i}": shards(chunk, metadata) for i, chunk in enumerate(self.chunks)}
        optimizer = self.optimizer.sharded_state_dict(models, is_loading=loading, metadata=metadata)
        average = {"average": self.average.sharded_state()} if self.average else {}
        return {**models, "optimizer": optimizer, **average}

    def load(self, state: dict[str, Any]) -> None:
        load_chunk = adapters.load_adapters if self.lora.on else load_model
        for i, chunk in enumerate(self.chunks):
            load_chunk(chunk, state[f"model{i}"])
        optimizer_state.load(self.optimizer, state["optimizer"])
        if self.average:
            self.average.load(state["average"])


def _forward_step(
    loss: LossFunction, batches: Iterator[PackedBatch], ddp: DistributedDataParallel
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    batch = next(batches)
    hidden_NH = ddp(batch)

    def of_hidden(hidden_NH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss_sum, tokens = loss(ddp.module, batch, hidden_NH)
        report = torch.stack([loss_sum.detach().double(), loss_sum.new_tensor(tokens, dtype=torch.float64)])
        return loss_sum, loss_sum.new_tensor(tokens, dtype=torch.int32), report

    return hidden_NH, of_hidden


def _runs(rows: Sequence[int]) -> str:
    """Row numbers in short: 3-7, 9."""
    first_of: dict[int, list[int]] = {}
    for place, row in enumerate(sorted(rows)):
        first_of.setdefault(row - place, []).append(row)
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in first_of.values())
