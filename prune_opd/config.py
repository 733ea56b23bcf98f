"""Everything a run is made of, as frozen dataclasses. A recipe returns one `TrainConfig` (or one `SftConfig`).

Each dataclass checks its own values when it is made, so a wrong setting never reaches a model; what needs files or
several parts at once (does TP divide the heads? do the tokenizers agree?) is in `check.py`. Symbols are the paper's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from prune_opd.config_checkpoint import CheckpointConfig as CheckpointConfig
from prune_opd.config_checkpoint import SurvivalConfig as SurvivalConfig
from prune_opd.config_checks import between as _between
from prune_opd.config_checks import one_of as _one_of
from prune_opd.config_checks import required as _required
from prune_opd.config_data import DataConfig as DataConfig
from prune_opd.config_memory import MemoryConfig as MemoryConfig
from prune_opd.config_planning import PlanningConfig as PlanningConfig
from prune_opd.config_precision import KV_CACHE_DTYPES, QUANTIZATIONS
from prune_opd.config_precision import Fp8Config as Fp8Config
from prune_opd.config_precision import PrecisionConfig as PrecisionConfig
from prune_opd.config_rollout import InflightConfig as InflightConfig
from prune_opd.config_rollout import check_inflight, check_long_tail
from prune_opd.config_sft import CorpusConfig as CorpusConfig
from prune_opd.config_sft import ModelShape as ModelShape
from prune_opd.config_sft import SftStage as SftStage
from prune_opd.config_track import TrackConfig as TrackConfig
from prune_opd.errors import ConfigError

# ---------------------------------------------------------------------------------------------------- the method


@dataclass(frozen=True)
class GateConfig:
    """The drift gate (Prune-OPD §3; method symbols O, γ, B, C, R, W). Defaults are the paper's."""

    metric: str = (
        "overlap"  # overlap: O_t < threshold | teacher_top_p: the sampled token is outside the teacher's nucleus
    )
    k: int = 16  # size of both top-k sets
    threshold: float = 0.7  # γ, strict
    w_drop: float = 0.01  # lost reliability per event
    w_base: float = 0.5  # weight that is left where reliability is 0; 0 really prunes the tail
    weight_normalisation: str = "none"  # none | base: divide by 1 + w_base | mean: divide by the response's mean weight
    top_p: float = 0.95  # p of teacher_top_p

    def __post_init__(self) -> None:
        _one_of("gate.metric", self.metric, ("overlap", "teacher_top_p"))
        _between("gate.k", self.k, 1)
        _between("gate.threshold", self.threshold, 0, 1)
        _between("gate.w_drop", self.w_drop, 0, 1)
        _between("gate.w_base", self.w_base, 0)
        _one_of("gate.weight_normalisation", self.weight_normalisation, ("none", "base", "mean"))
        _between("gate.top_p", self.top_p, 0, 1, open_low=True)


STRATEGIES = ("full", "topd", "popd", "prune", "marginal", "replay")


@dataclass(frozen=True)
class HorizonConfig:
    """How many response tokens the next rollout batch may have (Prune-OPD §3.3, POPD/TOPD). Lengths in tokens.

    Constants that the papers did not publish, or chose per pair, have no default: they must be set where they are used.
    """

    strategy: str = "prune"  # full | topd | popd | prune | marginal (ours) | replay (a control)
    max_len: int = 12288  # most response tokens there ever are: what full has always
    min_len: int = 1024  # prune, marginal: the least M
    init_len: int | None = None  # prune, marginal: M_0; popd: H_0
    step: int = 100  # prune, marginal: how far M moves
    hit_ratio: float = 0.1  # prune: share of responses that must reach the boundary
    margin: int = 100  # prune: boundary = max(min_len, M - margin); marginal: how far M stays above its optimum
    patience: int = 3  # prune: misses in a row before M shrinks
    rho: float | None = None  # topd: H = rho * max_len
    increment: int | None = None  # popd: ΔH
    interval: int | None = None  # popd: Δs, in steps
    finished_rows: str = (
        "miss"  # prune: responses that ended by themselves before the boundary | hit_if_reliable | exclude
    )
    price: float = 0.5  # marginal: of a generated token, in reliable tokens
    windows: tuple[int, ...] = ()  # replay: the window of every step; the last one stays
    # A control: each response gets a limit of its own, uniform and as far around the window as 1..max_len allows.
    scatter: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "windows", tuple(self.windows))  # OmegaConf hands over a list
        _one_of("horizon.strategy", self.strategy, STRATEGIES)
        _one_of("horizon.finished_rows", self.finished_rows, ("miss", "hit_if_reliable", "exclude"))
        _between("horizon.max_len", self.max_len, 1)
        _between("horizon.min_len", self.min_len, 1, self.max_len)
        _between("horizon.step", self.step, 1)
        _between("horizon.hit_ratio", self.hit_ratio, 0, 1)
        _between("horizon.margin", self.margin, 0)
        _between("horizon.patience", self.patience, 1)
        _between("horizon.price", self.price, 0, 1)
        for window in self.windows:
            _between("horizon.windows", window, 1)
        if self.init_len is not None:
            _between("horizon.init_len", self.init_len, 1)
        if self.rho is not None:
            _between("horizon.rho", self.rho, 0, 1, open_low=True)
        if self.increment is not None:
            _between("horizon.increment", self.increment, 0)
        if self.interval is not None:
            _between("horizon.interval", self.interval, 1)
        if self.strategy == "topd":
            _required(
                "horizon.rho", self.rho, "topd needs the fraction of max_len to generate (the paper has 0.10 and 0.25)"
            )
        if self.strategy in ("prune", "marginal"):
            why = f"{self.strategy} needs its first window; the paper chooses it per pair"
            _required("horizon.init_len", self.init_len, why)
        if self.strategy == "replay":
            _required("horizon.windows", self.windows or None, "replay needs the window of every step")
        if self.strategy == "popd":
            unpublished = "popd needs it, and the paper's value is not published"
            _required("horizon.init_len", self.init_len, unpublished)
            _required("horizon.increment", self.increment, unpublished)
            _required("horizon.interval", self.interval, unpublished)


OBJECTIVES = (
    "topk_reverse_kl",
    "sampled_token",
    "local_support_matching",
    "topk_forward_kl",
    "full_vocab_reverse_kl",
    "full_vocab_jsd",
)


@dataclass(frozen=True)
class ObjectiveConfig:
    """The per-token objective (Prune-OPD §2; objective.py has the formulas). One global token mean, always."""

    # topk_reverse_kl | sampled_token | local_support_matching | topk_forward_kl |
    # full_vocab_reverse_kl | full_vocab_jsd
    name: str = "topk_reverse_kl"
    k: int = 16  # candidates per token (of each model); the paper of local_support_matching has 32
    support: str = "student"  # topk_reverse_kl: whose top-k | teacher | union | intersection
    weight: str = "student_p"  # topk_reverse_kl: of a candidate | teacher_p | none (every candidate counts 1)
    beta: float = 0.5  # full_vocab_jsd: the teacher's share of the mixture
    clip: float = 0.2  # of the ratio p / p_old, where a batch serves several updates (optimizer.updates_per_batch)
    dual_clip: float = 3.0  # largest ratio that a negative reward is multiplied by
    temperature: float = 1.0  # of both models' logits

    def __post_init__(self) -> None:
        _one_of("objective.name", self.name, OBJECTIVES)
        _between("objective.k", self.k, 1)
        _one_of("objective.support", self.support, ("student", "teacher", "union", "intersection"))
        _one_of("objective.weight", self.weight, ("student_p", "teacher_p", "none"))
        _between("objective.beta", self.beta, 0, 1, open_low=True, open_high=True)
        _between("objective.clip", self.clip, 0, 1, open_low=True)
        _between("objective.dual_clip", self.dual_clip, 1, open_low=True)
        _between("objective.temperature", self.temperature, 0, open_low=True)
        owners = {"support": "topk_reverse_kl", "weight": "topk_reverse_kl", "beta": "full_vocab_jsd"}
        for setting, owner in owners.items():
            if self.name != owner and getattr(self, setting) != getattr(ObjectiveConfig, setting):
                raise ConfigError(
                    f"objective.{setting} = {getattr(self, setting)!r} is a setting of {owner}, and "
                    f"objective.name = {self.name} has none: leave it out"
                )


@dataclass(frozen=True)
class WeightingConfig:
    """A published token weighting, to compare with; it multiplies the gate's (weighting.py has the formulas)."""

    name: str = "none"  # none | entropy_aware | iw_opd | tip
    entropy_threshold: float = 0.8  # entropy_aware: τ, teacher entropy above which a forward KL is added [nats]
    forward_k: int = 16  # entropy_aware: the forward KL's candidates, the teacher's best
    gamma: float = 0.5  # iw_opd: γ, extra weight of a response's first token
    retain: float = 0.5  # tip: share of a response's tokens that is trained on

    def __post_init__(self) -> None:
        _one_of("weighting.name", self.name, ("none", "entropy_aware", "iw_opd", "tip"))
        _between("weighting.entropy_threshold", self.entropy_threshold, 0)
        _between("weighting.forward_k", self.forward_k, 1)
        _between("weighting.gamma", self.gamma, 0)
        _between("weighting.retain", self.retain, 0, 1, open_low=True)


# ---------------------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class RolloutConfig:
    """What is generated each step, and the vLLM engine that does it."""

    prompts: int = 64  # per step
    responses: int = 4  # per prompt
    temperature: float = 1.0  # of the sampling; the objective has its own
    top_p: float = 1.0  # the sampling's nucleus; 1: the whole vocabulary
    max_prompt_len: int = 1024  # tokens; a longer prompt is a bad row
    tensor_parallel: int = 1  # ranks per engine; world / tensor_parallel engines share the prompts
    kv_cache_gb: float = 1.0  # CPU only: a GPU takes gpu_memory_utilization
    gpu_memory_utilization: float = 0.5  # share of a GPU's memory that vLLM takes, weights included
    max_num_seqs: int = 256  # responses that an engine works on at a time
    enforce_eager: bool | None = None  # vLLM without compiled graphs; null: so on the CPU, compiled on a GPU
    bucket_mb: float = 512  # of weights on their way from the trainer; two buckets exist at a time
    quantization: str | None = None  # to FP8 at every load: fp8 | fp8_per_tensor | fp8_per_channel | fp8_per_block
    kv_cache_dtype: str = "auto"  # auto: that of the parameters | fp8 (e4m3) | fp8_e4m3 | fp8_e5m2
    inflight: InflightConfig = field(default_factory=InflightConfig)
    oversample: float = 1.0  # prompts that a step starts, of `prompts`: the first complete ones are kept
    partial: bool = False  # oversample > 1: what is left goes on in the next step, and is not started again

    def __post_init__(self) -> None:
        _between("rollout.oversample", self.oversample, 1, 16)
        for name in ("prompts", "responses", "max_prompt_len", "tensor_parallel", "max_num_seqs"):
            _between(f"rollout.{name}", getattr(self, name), 1)
        _between("rollout.bucket_mb", self.bucket_mb, 0, open_low=True)
        _between("rollout.temperature", self.temperature, 0, open_low=True)
        _between("rollout.top_p", self.top_p, 0, 1, open_low=True)
        _between("rollout.kv_cache_gb", self.kv_cache_gb, 0, open_low=True)
        _between("rollout.gpu_memory_utilization", self.gpu_memory_utilization, 0, 1, open_low=True)
        if self.quantization is not None:
            _one_of("rollout.quantization", self.quantization, QUANTIZATIONS)
        _one_of("rollout.kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW through megatron-core, fp32 master weights. `schedule` runs from lr to min_lr after the warm-up."""

    lr: float = 1e-6  # the highest learning rate
    min_lr: float = 0.0  # linear, cosine: where the schedule ends
    schedule: str = "constant"  # constant | linear | cosine
    warmup_steps: int = 0  # steps in which the rate rises from 0 to lr
    weight_decay: float = 0.01  # decoupled (AdamW)
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.999  # decay of the second moment
    eps: float = 1e-8  # what Adam adds to the denominator
    clip_grad: float = 1.0  # largest norm of the whole gradient; 0: no clipping
    updates_per_batch: int = 1  # minibatches of whole responses that a rollout batch is split into, one update each

    def __post_init__(self) -> None:
        _between("optimizer.updates_per_batch", self.updates_per_batch, 1)
        _one_of("optimizer.schedule", self.schedule, ("constant", "linear", "cosine"))
        _between("optimizer.lr", self.lr, 0)
        _between("optimizer.min_lr", self.min_lr, 0, self.lr)
        _between("optimizer.warmup_steps", self.warmup_steps, 0)
        _between("optimizer.weight_decay", self.weight_decay, 0)
        _between("optimizer.beta1", self.beta1, 0, 1)
        _between("optimizer.beta2", self.beta2, 0, 1)
        _between("optimizer.eps", self.eps, 0, open_low=True)
        _between("optimizer.clip_grad", self.clip_grad, 0)


@dataclass(frozen=True)
class ParallelConfig:
    """Layout of the student, and the teacher's where it differs. What is left over of the ranks is data parallel.

    Tensor parallel ranks are next to each other, pipeline stages farthest apart (megatron-core's order).
    """

    nproc: int = 2  # ranks that `prune-opd` starts on this node when it is not already under torchrun
    tensor: int | None = None  # TP; None: the ranks that pipeline and context leave
    pipeline: int = 1  # stages
    virtual_pipeline: int = 1  # chunks of layers per stage (interleaved schedule)
    expert: int = 1  # ranks that share a layer's experts (MoE): a multiple of tensor
    context: int = 1  # ranks that share a sequence
    sequence_parallel: bool = False  # residuals and norms cut along the tokens over the TP ranks
    distributed_optimizer: bool = False  # master weights and Adam's moments cut over the data-parallel ranks
    recompute: str = "none"  # activations made again in the backward pass: selective (attention) | full (every layer)
    teacher_tensor: int | None = None  # the teacher's own TP; None: as the student
    teacher_pipeline: int | None = None  # likewise; it has no virtual pipeline and no sequence parallelism
    teacher_expert: int = 1  # its own; it does not follow `expert`
    microbatch_tokens: int = 16384  # budget of one packed micro-batch on a rank (prompt + response)
    loss_chunk_tokens: int = 1024  # tokens whose logits, of both models, are alive at a time in the loss
    timeout_minutes: float = 10.0  # of every collective (of some, whole ones): a rank that stops answering ends the run

    def __post_init__(self) -> None:
        for name in ("nproc", "pipeline", "virtual_pipeline", "expert", "context", "teacher_expert"):
            _between(f"parallel.{name}", getattr(self, name), 1)
        for name in ("tensor", "teacher_tensor", "teacher_pipeline"):
            if getattr(self, name) is not None:
                _between(f"parallel.{name}", getattr(self, name), 1)
        _one_of("parallel.recompute", self.recompute, ("none", "selective", "full"))
        _between("parallel.microbatch_tokens", self.microbatch_tokens, 1)
        _between("parallel.loss_chunk_tokens", self.loss_chunk_tokens, 1)
        _between("parallel.timeout_minutes", self.timeout_minutes, 0, open_low=True)
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ConfigError(
                f"parallel.virtual_pipeline = {self.virtual_pipeline} needs a pipeline: "
                "set parallel.pipeline to at least 2, or parallel.virtual_pipeline=1"
            )

    def tensor_size(self, world_size: int) -> int:
        return self.tensor or max(world_size // (self.pipeline * self.context), 1)


@dataclass(frozen=True)
class EvalConfig:
    """Accuracy on held-out problems, sampled by the rollout engine. `every` = 0: only before and after the run."""

    every: int = 0  # steps; 0: only before and after the run
    problems: int = 256  # of each task; 0: no evaluation
    problems_between: int | None = None  # of the evaluations before the last one; None: all
    samples: int = 1  # avg@samples
    temperature: float = 1.0  # of the sampling; 0: greedy
    top_p: float = 1.0  # the sampling's nucleus; the papers have 0.95
    max_len: int | None = None  # None: horizon.max_len
    seed: int = 777  # of the problems and of the sampling, the same at every evaluation
    sources: tuple[str, ...] = ()  # tasks and files with answers, as data.source; none: the training source, held out
    generations: int = 64  # answers of each task that every evaluation leaves in generations/

    def __post_init__(self) -> None:
        _between("evaluation.generations", self.generations, 0)
        _between("evaluation.every", self.every, 0)
        _between("evaluation.problems", self.problems, 0)
        if self.problems_between is not None:
            _between("evaluation.problems_between", self.problems_between, 1, max(self.problems, 1))
        _between("evaluation.samples", self.samples, 1)
        _between("evaluation.temperature", self.temperature, 0)
        _between("evaluation.top_p", self.top_p, 0, 1, open_low=True)
        if self.max_len is not None:
            _between("evaluation.max_len", self.max_len, 1)


@dataclass(frozen=True)
class TrainConfig:
    """One Prune-OPD run. `student` and `teacher` are Hugging Face directories with the same tokenizer."""

    name: str  # of the run: runs/NAME is its directory
    student: str  # a Hugging Face directory
    teacher: str  # a Hugging Face directory
    steps: int  # of training; the schedule of the learning rate ends there
    horizon: HorizonConfig
    gate: GateConfig | None = field(default_factory=GateConfig)  # None: plain OPD, every token at weight 1
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    survival: SurvivalConfig = field(default_factory=SurvivalConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    planning: PlanningConfig = field(default_factory=PlanningConfig)
    seed: int = 0  # of prompts, prompt order and sampling
    stop_after: int | None = (
        None  # save and stop after this step (a time-boxed job); the schedule stays that of `steps`
    )

    def __post_init__(self) -> None:
        _between("steps", self.steps, 1)
        if self.stop_after is not None:
            _between("stop_after", self.stop_after, 1)
        if self.gate is None and self.horizon.strategy in ("prune", "marginal"):
            raise ConfigError(
                f"gate = null with horizon.strategy = {self.horizon.strategy}: the window follows the gate's reliable "
                "length; "
                "set a gate or another strategy"
            )
        check_inflight(self)
        check_long_tail(self)


# -------------------------------------------------------------------------------------------- supervised training


@dataclass(frozen=True)
class SftConfig:
    """Supervised training of a tiny model on worked solutions, through the same Megatron path as the distillation."""

    name: str  # of the model
    output: str  # the Hugging Face directory that is written
    stages: tuple[SftStage, ...]
    init: str | None = None  # a Hugging Face directory; None: `shape` from nothing
    shape: ModelShape = field(default_factory=ModelShape)
    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig(tensor=1))
    beta2: float = 0.98  # of AdamW
    weight_decay: float = 0.01  # of AdamW
    seed: int = 0  # of the weights, where they are made from nothing


def to_dict(config: Any) -> dict[str, Any]:
    """The plain nested dictionary of a config, as it is written to config.yaml."""
    return dataclasses.asdict(config)
