"""Settings of the method. Defaults are the papers'; symbols are theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from prune_opd.config.checks import (
    Checked,
    Count,
    CountOrZero,
    Positive,
    PositiveOrZero,
    Share,
    ShareAboveZero,
    between,
    one_of,
    required,
)
from prune_opd.errors import ConfigError


@dataclass(frozen=True)
class GateConfig(Checked, name="gate"):
    """The drift gate (Prune-OPD §3; method symbols O, γ, B, C, R, W). Defaults are the paper's."""

    # overlap: O_t < threshold | teacher_top_p: the sampled token is outside the teacher's nucleus | ours:
    # acceptance: Σ min(p, q) over the student's top k < threshold | shared_mass: p's mass on the shared ids < threshold
    # overlap_quantile: O_t < the pair's own γ | change_point: the acceptance has fallen along the response, by the
    # pair's own measure | kl_agreement, of KAT: the mean KL of the last `low_tokens` tokens < threshold · the usual KL,
    # so nothing is left to learn
    metric: Literal[
        "overlap",
        "teacher_top_p",
        "acceptance",
        "shared_mass",
        "overlap_quantile",
        "change_point",
        "kl_agreement",
    ] = "overlap"
    k: Count = 16  # size of both top-k sets
    threshold: Share = 0.7  # γ, strict
    memory: bool = True  # false: a token's weight is of its own event alone, as if reliability could recover
    w_drop: Share = 0.01  # lost reliability per event
    w_base: PositiveOrZero = 0.5  # weight that is left where reliability is 0; 0 really prunes the tail
    # none | base: divide by 1 + w_base | mean: divide by the response's mean weight
    weight_normalisation: Literal["none", "base", "mean"] = "none"
    top_p: ShareAboveZero = 0.95  # p of teacher_top_p
    slack: PositiveOrZero = 0.5  # change_point: deviations a token that are no evidence
    alarm: Positive = 8.0  # change_point: deviations that come together before it is an event
    low_tokens: Count = 64  # kl_agreement: tokens over which the KL is low before it is an event
    quantile: Share = 0.05  # overlap_quantile: share of a response's first tokens that may lie below the pair's γ
    # overlap_quantile, change_point, kl_agreement: first tokens of a response, where the usual is found
    early_tokens: Count = 16
    # overlap_quantile, change_point: first steps of a run in which it is; kl_agreement: the last ones
    calibration_steps: Count = 5

    @property
    def along(self) -> bool:
        """Whether events are found along a response, by what is usual for the pair."""
        return self.metric in ("change_point", "kl_agreement")


STRATEGIES = ("full", "topd", "popd", "prune", "marginal", "adwin", "fastopd")


@dataclass(frozen=True)
class HorizonConfig(Checked, name="horizon"):
    """How many response tokens the next rollout batch may have (Prune-OPD §3.3, POPD/TOPD). Lengths in tokens.

    Constants that the papers did not publish, or chose per pair, have no default: they must be set where they are used.
    """

    strategy: str = "prune"  # full | topd | popd | prune | marginal (ours) | adwin | fastopd
    max_len: Count = 12288  # most response tokens there ever are: what full has always
    min_len: Count = 1024  # prune, marginal, adwin, fastopd: the least M
    init_len: Count | None = None  # prune, marginal, fastopd: M_0; popd: H_0
    step: Count = 100  # prune, marginal, fastopd: how far M moves
    hit_ratio: Share = 0.1  # prune: share of responses that must reach the boundary; fastopd: the end of the window
    # prune: boundary = max(min_len, M - margin); marginal, adwin: how far M stays above its optimum; fastopd: tokens
    # before the end of the window whose signals are watched
    margin: CountOrZero = 100
    patience: Count = 3  # prune: misses in a row before M shrinks; fastopd: steps without progress before M grows
    rho: ShareAboveZero | None = None  # topd: H = rho * max_len
    increment: CountOrZero | None = None  # popd: ΔH
    interval: Count | None = None  # popd: Δs, in steps
    # prune: what responses are that ended by themselves before the boundary
    finished_rows: Literal["miss", "hit_if_reliable", "exclude"] = "miss"
    price: Share = 0.5  # marginal, adwin: of a generated token, in reliable tokens
    probe_every: Count = 10  # adwin: steps from one full-length probe to the next
    tolerance: Share = (
        0.02  # fastopd: how much further a signal must come to be progress, as a share of its first value
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("horizon.strategy", self.strategy, STRATEGIES)
        between("horizon.min_len", self.min_len, 1, self.max_len)
        if self.strategy == "topd":
            required(
                "horizon.rho", self.rho, "topd needs the fraction of max_len to generate (the paper has 0.10 and 0.25)"
            )
        if self.strategy in ("prune", "marginal", "fastopd"):
            why = f"{self.strategy} needs its first window; the paper chooses it per pair"
            required("horizon.init_len", self.init_len, why)
        if self.strategy == "popd":
            unpublished = "popd needs it, and the paper's value is not published"
            required("horizon.init_len", self.init_len, unpublished)
            required("horizon.increment", self.increment, unpublished)
            required("horizon.interval", self.interval, unpublished)


OBJECTIVES = (
    "topk_reverse_kl",
    "sampled_token",
    "sampled_k2",
    "sampled_k3",
    "local_support_matching",
    "topk_forward_kl",
    "topk_mixed_kl",
    "topk_jsd",
    "priced_reverse_kl",
    "full_vocab_reverse_kl",
    "full_vocab_forward_kl",
    "full_vocab_mixed_kl",
    "full_vocab_jsd",
)
# Settings that only some objectives have.
_OWNERS = {
    **dict.fromkeys(("support", "weight", "tail"), ("topk_reverse_kl",)),
    **dict.fromkeys(("discount", "baseline"), ("sampled_token",)),
    "beta": ("full_vocab_jsd", "topk_jsd"),
    "forward_share": ("full_vocab_mixed_kl", "topk_mixed_kl"),
    "renormalise": ("topk_forward_kl",),
    "outside_logp": ("priced_reverse_kl",),
    **dict.fromkeys(("logp_min", "loss_max"), ("sampled_k2", "sampled_k3", "topk_forward_kl")),
}


@dataclass(frozen=True)
class ObjectiveConfig(Checked, name="objective"):
    """The per-token objective (Prune-OPD §2; method/objective.py and divergences.py have the formulas).

    One global token mean, always.
    """

    # topk_reverse_kl | sampled_token | sampled_k2 | sampled_k3 | local_support_matching | topk_forward_kl |
    # topk_mixed_kl | topk_jsd | priced_reverse_kl | full_vocab_reverse_kl | full_vocab_forward_kl |
    # full_vocab_mixed_kl | full_vocab_jsd
    name: str = "topk_reverse_kl"
    k: Count = 16  # candidates per token (of each model); the paper of local_support_matching has 32
    support: Literal["student", "teacher", "union", "intersection"] = "student"  # topk_reverse_kl: whose top-k
    # topk_reverse_kl: of a candidate, 1 in sum over the support; none: uniform, 1 / |support|, as in the released code
    weight: Literal["student_p", "teacher_p", "none"] = "student_p"
    # topk_reverse_kl: what becomes of the ids outside the support: none: the published form, which leaks mass to them |
    # bucket: one more outcome | centred: neither raised nor lowered
    tail: Literal["none", "bucket", "centred"] = "none"
    discount: Share = 0.0  # sampled_token: γ of the later tokens' rewards in a token's own; 0: its own alone
    # sampled_token: what is taken from a token's reward, without changing the mean gradient: nothing | reverse_kl: its
    # mean, − KL(p ‖ q) over the vocabulary (vOPD)
    baseline: Literal["none", "reverse_kl"] = "none"
    beta: Annotated[float, Interval(gt=0, lt=1)] = 0.5  # full_vocab_jsd, topk_jsd: the teacher's share of the mixture
    # full_vocab_mixed_kl, topk_mixed_kl: of the forward KL; the reverse KL has the rest
    forward_share: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    renormalise: Literal["q", "none", "both"] = "q"  # topk_forward_kl: on the teacher's top-k; none: raw q and p
    outside_logp: Annotated[
        float, Interval(lt=0)
    ] = -100.0  # priced_reverse_kl: log q outside the teacher's top-k [nats]
    # sampled_k2, sampled_k3, topk_forward_kl: log p and log q are taken as no less [nats]; verl has -10
    logp_min: Annotated[float, Interval(lt=0)] | None = None
    loss_max: Positive | None = None  # the same three: a token's divergence is held within ± this [nats]; verl has 10
    # what goes through the logits: torch: its own kernels | triton: ours, fewer passes; needs a GPU and Triton
    kernels: Literal["torch", "triton"] = "torch"
    clip: ShareAboveZero = (
        0.2  # of the ratio p / p_old, where a batch serves several updates (optimizer.updates_per_batch)
    )
    dual_clip: Annotated[float, Interval(gt=1)] = 3.0  # largest ratio that a negative reward is multiplied by
    temperature: Positive = 1.0  # of both models' logits
    teacher_temperature: Positive | None = None  # of the teacher's logits alone; null: the same
    # as_is: every id that ends a response is its own | class: those of student and teacher are one outcome for both
    # models, and a stop on any of them is a stop
    ends: Literal["as_is", "class"] = "as_is"
    # a token's loss where trainer and rollout engine differ in its probability: none: as it is | truncated: times
    # p / p_engine, at most mismatch_high | masked: times that, 0 where it is outside mismatch_low … mismatch_high
    mismatch: Literal["none", "truncated", "masked"] = "none"
    mismatch_low: Annotated[float, Interval(gt=0, lt=1)] = 0.5  # least usual ratio (IcePop's α)
    mismatch_high: Annotated[float, Interval(gt=1)] | None = (
        None  # largest usual ratio; null: 2 (C of TIS), with masked 5 (IcePop's β)
    )

    @property
    def mismatch_bounds(self) -> tuple[float, float]:
        """Least and largest usual ratio of the trainer's to the engine's probability of a sampled token."""
        return self.mismatch_low, self.mismatch_high or (5.0 if self.mismatch == "masked" else 2.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("objective.name", self.name, OBJECTIVES)
        for setting, owners in _OWNERS.items():
            if self.name not in owners and getattr(self, setting) != getattr(ObjectiveConfig, setting):
                raise ConfigError(
                    f"objective.{setting} = {getattr(self, setting)!r} is a setting of {' and '.join(owners)}, and "
                    f"objective.name = {self.name} has none: leave it out"
                )
        if self.tail == "bucket" and self.weight != "student_p":
            raise ConfigError(
                f"objective.tail = bucket weighs by the student's probabilities, and objective.weight = {self.weight} "
                "does not: take objective.weight=student_p, or objective.tail=centred"
            )

    @property
    def of_teacher(self) -> float:
        """Temperature of the teacher's logits."""
        return self.temperature if self.teacher_temperature is None else self.teacher_temperature


@dataclass(frozen=True)
class WeightingConfig(Checked, name="weighting"):
    """A published token weighting, to compare with; it multiplies the gate's (method/weighting.py has the formulas)."""

    name: Literal["none", "entropy_aware", "iw_opd", "tip", "sdar", "tropd"] = "none"  # which one, if any
    entropy_threshold: PositiveOrZero = (
        0.8  # entropy_aware: τ, teacher entropy above which a forward KL is added [nats]
    )
    forward_k: Count = 16  # entropy_aware, tropd: the forward KL's candidates, the teacher's best
    gamma: PositiveOrZero = 0.5  # iw_opd: γ, extra weight of a response's first token
    retain: ShareAboveZero = 0.5  # tip: share of a response's tokens that is trained on
    sharpness: Positive = 1.0  # sdar: β, how steep the gate is [1 / nat]
