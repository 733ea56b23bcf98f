"""Settings of the optimizer, the layout, the number formats and the device's memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from annotated_types import Interval

from prune_opd.config.checks import Checked, Count, CountOrZero, Positive, PositiveOrZero, Share, between, check_fields
from prune_opd.errors import ConfigError

Schedule = Literal["constant", "linear", "cosine"]
Fp8Recipe = Literal["delayed", "tensorwise", "blockwise"]


@dataclass(frozen=True)
class OptimizerConfig(Checked, name="optimizer"):
    """AdamW through megatron-core, fp32 master weights. `schedule` runs from lr to min_lr after the warm-up."""

    lr: PositiveOrZero = 1e-6  # the highest learning rate
    min_lr: PositiveOrZero = 0.0  # linear, cosine: where the schedule ends
    schedule: Schedule = "constant"  # of the learning rate
    warmup_steps: CountOrZero = 0  # steps in which the rate rises from 0 to lr
    weight_decay: PositiveOrZero = 0.01  # decoupled (AdamW)
    beta1: Share = 0.9  # decay of the first moment
    beta2: Share = 0.999  # decay of the second moment
    eps: Positive = 1e-8  # what Adam adds to the denominator
    clip_grad: PositiveOrZero = 1.0  # largest norm of the whole gradient; 0: no clipping
    updates_per_batch: Count = 1  # minibatches of whole responses that a rollout batch is split into, one update each

    def __post_init__(self) -> None:
        super().__post_init__()
        between("optimizer.min_lr", self.min_lr, 0, self.lr)


@dataclass(frozen=True)
class ParallelConfig(Checked, name="parallel"):
    """Layout of the student, and the teacher's where it differs. What is left over of the ranks is data parallel.

    Tensor parallel ranks are next to each other, pipeline stages farthest apart (megatron-core's order).
    """

    nproc: Count = 2  # ranks that `prune-opd` starts on this node when it is not already under torchrun
    tensor: Count | None = None  # TP; None: the ranks that pipeline and context leave
    pipeline: Count = 1  # stages
    virtual_pipeline: Count = 1  # chunks of layers per stage (interleaved schedule)
    expert: Count = 1  # ranks that share a layer's experts (MoE): a multiple of tensor
    context: Count = 1  # ranks that share a sequence
    sequence_parallel: bool = False  # residuals and norms cut along the tokens over the TP ranks
    distributed_optimizer: bool = False  # master weights and Adam's moments cut over the data-parallel ranks
    # activations made again in the backward pass: selective: attention's | full: every layer's
    recompute: Literal["none", "selective", "full"] = "none"
    teacher_tensor: Count | None = None  # the teacher's own TP; None: as the student
    teacher_pipeline: Count | None = None  # likewise; it has no virtual pipeline and no sequence parallelism
    teacher_expert: Count = 1  # its own; it does not follow `expert`
    microbatch_tokens: Count = 16384  # budget of one packed micro-batch on a rank (prompt + response)
    loss_chunk_tokens: Count = 1024  # tokens whose logits, of both models, are alive at a time in the loss
    timeout_minutes: Positive = (
        10.0  # of every collective (of some, whole ones): a rank that stops answering ends the run
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ConfigError(
                f"parallel.virtual_pipeline = {self.virtual_pipeline} needs a pipeline: "
                "set parallel.pipeline to at least 2, or parallel.virtual_pipeline=1"
            )

    def tensor_size(self, world_size: int) -> int:
        return self.tensor or max(world_size // (self.pipeline * self.context), 1)


@dataclass(frozen=True)
class Fp8Config:
    """FP8 matrix products in one model's layers, through Transformer Engine on Hopper. The head always stays bf16.

    delayed: one scale a tensor, from the largest values of earlier batches | tensorwise: one scale a tensor, from its
    own largest value | blockwise: a scale for each 1 × 128 values of an activation and each 128 × 128 of a weight.
    """

    format: Literal["e4m3", "hybrid"] | None = None  # null: no FP8 | e4m3 | hybrid: e4m3 forward, e5m2 gradients
    recipe: Fp8Recipe = "blockwise"  # how scales are chosen
    param: bool = False  # keep the weights in FP8 too; the optimizer's master weights stay fp32
    first_layers_bf16: CountOrZero = 0  # layers at the start that stay in bf16; not with delayed
    last_layers_bf16: CountOrZero = 0  # likewise, at the end
    amax_history: Count = 1024  # delayed: batches that a scale looks back on

    @property
    def on(self) -> bool:
        return self.format is not None

    def validate(self, name: str) -> None:
        """Raises `ConfigError`. name: the dotted name of this part, which both models have."""
        if str(self.recipe) == "mxfp8":
            raise ConfigError(
                f"{name}.recipe = 'mxfp8' needs a Blackwell GPU, and this project is for Hopper: "
                f"choose one of {', '.join(get_args(Fp8Recipe))}"
            )
        check_fields(self, f"{name}.")
        for end in ("first_layers_bf16", "last_layers_bf16"):
            if self.on and self.recipe == "delayed" and getattr(self, end) > 0:
                raise ConfigError(
                    f"{name}.{end} = {getattr(self, end)} does not go with recipe = delayed, whose scales are updated "
                    f"for all layers at once: choose recipe=tensorwise or blockwise, or {end}=0"
                )
        self._refuse_idle(name)

    def _refuse_idle(self, name: str) -> None:
        """What is set and would do nothing is a mistake."""
        settings: tuple[str, ...] = ()
        why = remedy = ""
        if not self.on:
            settings = ("recipe", "param", "first_layers_bf16", "last_layers_bf16", "amax_history")
            why, remedy = f"{name}.format = null", f"{name}.format=hybrid"
        elif self.recipe != "delayed":
            settings, why, remedy = ("amax_history",), f"recipe = {self.recipe}", f"{name}.recipe=delayed"
        for setting in settings:
            if (value := getattr(self, setting)) != getattr(Fp8Config, setting):
                raise ConfigError(
                    f"{name}.{setting} = {value!r} does nothing with {why}: leave it out, or set {remedy}"
                )


@dataclass(frozen=True)
class PrecisionConfig(Checked, name="precision"):
    """Student and teacher are set separately. FP8 of the rollouts: rollout.quantization and rollout.kv_cache_dtype."""

    params: Literal["bf16", "fp32"] = (
        "bf16"  # of both models and the rollouts; the optimizer's master weights are always fp32
    )
    student_fp8: Fp8Config = field(default_factory=Fp8Config)
    teacher_fp8: Fp8Config = field(default_factory=Fp8Config)

    def __post_init__(self) -> None:
        super().__post_init__()
        for role in ("student", "teacher"):
            fp8: Fp8Config = getattr(self, f"{role}_fp8")
            fp8.validate(f"precision.{role}_fp8")
            if role == "teacher" and fp8.on and fp8.recipe == "delayed":
                raise ConfigError(
                    "precision.teacher_fp8.recipe = 'delayed' never gets a scale: Transformer Engine updates it in "
                    "passes that make gradients, and the teacher makes none; choose recipe=blockwise or tensorwise"
                )
            if fp8.on and self.params != "bf16":
                raise ConfigError(
                    f"precision.params = {self.params!r} does not go with precision.{role}_fp8.format = "
                    f"{fp8.format!r}: what is not FP8 in such a model is bf16, so set precision.params=bf16"
                )


@dataclass(frozen=True)
class MemoryConfig(Checked, name="memory"):
    """What leaves the device in the phases that do not need it (config/memory_phases.py). All off: nothing moves.

    What is offloaded goes to pinned host memory. On the CPU a schedule that moves something is a dry one: the
    transitions are logged and nothing moves.
    """

    # vLLM outside its phases: 0 awake | 1 weights to the host, KV cache gone | 2 both gone
    sleep_level: Annotated[int, Interval(ge=0, le=2)] = 0
    staged_wake: bool = True  # wake the weights, load, and only then the KV cache; False: both before the load
    offload_student: bool = False  # weights, while they are neither trained nor sent
    offload_gradients: bool = False  # freed outside training: they start from zero there
    offload_optimizer: bool = False  # master weights and Adam's two moments, outside training
    offload_teacher: bool = False  # layers outside the teacher pass; its output weight outside that and training

    @property
    def on(self) -> bool:
        """Whether anything moves: how an engine wakes says nothing of whether it sleeps."""
        return dataclasses.replace(self, staged_wake=True) != MemoryConfig()
