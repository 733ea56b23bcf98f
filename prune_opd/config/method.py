"""Settings of the method. Defaults are the papers'; symbols are theirs."""

from __future__ import annotations

from dataclasses import dataclass

from prune_opd.config.checks import between, one_of, required
from prune_opd.errors import ConfigError


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
        one_of("gate.metric", self.metric, ("overlap", "teacher_top_p"))
        between("gate.k", self.k, 1)
        between("gate.threshold", self.threshold, 0, 1)
        between("gate.w_drop", self.w_drop, 0, 1)
        between("gate.w_base", self.w_base, 0)
        one_of("gate.weight_normalisation", self.weight_normalisation, ("none", "base", "mean"))
        between("gate.top_p", self.top_p, 0, 1, open_low=True)


STRATEGIES = ("full", "topd", "popd", "prune", "marginal")


@dataclass(frozen=True)
class HorizonConfig:
    """How many response tokens the next rollout batch may have (Prune-OPD §3.3, POPD/TOPD). Lengths in tokens.

    Constants that the papers did not publish, or chose per pair, have no default: they must be set where they are used.
    """

    strategy: str = "prune"  # full | topd | popd | prune | marginal (ours)
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

    def __post_init__(self) -> None:
        one_of("horizon.strategy", self.strategy, STRATEGIES)
        one_of("horizon.finished_rows", self.finished_rows, ("miss", "hit_if_reliable", "exclude"))
        between("horizon.max_len", self.max_len, 1)
        between("horizon.min_len", self.min_len, 1, self.max_len)
        between("horizon.step", self.step, 1)
        between("horizon.hit_ratio", self.hit_ratio, 0, 1)
        between("horizon.margin", self.margin, 0)
        between("horizon.patience", self.patience, 1)
        between("horizon.price", self.price, 0, 1)
        if self.init_len is not None:
            between("horizon.init_len", self.init_len, 1)
        if self.rho is not None:
            between("horizon.rho", self.rho, 0, 1, open_low=True)
        if self.increment is not None:
            between("horizon.increment", self.increment, 0)
        if self.interval is not None:
            between("horizon.interval", self.interval, 1)
        if self.strategy == "topd":
            required(
                "horizon.rho", self.rho, "topd needs the fraction of max_len to generate (the paper has 0.10 and 0.25)"
            )
        if self.strategy in ("prune", "marginal"):
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
    "local_support_matching",
    "topk_forward_kl",
    "full_vocab_reverse_kl",
    "full_vocab_jsd",
)


@dataclass(frozen=True)
class ObjectiveConfig:
    """The per-token objective (Prune-OPD §2; method/objective.py has the formulas). One global token mean, always."""

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
        one_of("objective.name", self.name, OBJECTIVES)
        between("objective.k", self.k, 1)
        one_of("objective.support", self.support, ("student", "teacher", "union", "intersection"))
        one_of("objective.weight", self.weight, ("student_p", "teacher_p", "none"))
        between("objective.beta", self.beta, 0, 1, open_low=True, open_high=True)
        between("objective.clip", self.clip, 0, 1, open_low=True)
        between("objective.dual_clip", self.dual_clip, 1, open_low=True)
        between("objective.temperature", self.temperature, 0, open_low=True)
        owners = {"support": "topk_reverse_kl", "weight": "topk_reverse_kl", "beta": "full_vocab_jsd"}
        for setting, owner in owners.items():
            if self.name != owner and getattr(self, setting) != getattr(ObjectiveConfig, setting):
                raise ConfigError(
                    f"objective.{setting} = {getattr(self, setting)!r} is a setting of {owner}, and "
                    f"objective.name = {self.name} has none: leave it out"
                )


@dataclass(frozen=True)
class WeightingConfig:
    """A published token weighting, to compare with; it multiplies the gate's (method/weighting.py has the formulas)."""

    name: str = "none"  # none | entropy_aware | iw_opd | tip
    entropy_threshold: float = 0.8  # entropy_aware: τ, teacher entropy above which a forward KL is added [nats]
    forward_k: int = 16  # entropy_aware: the forward KL's candidates, the teacher's best
    gamma: float = 0.5  # iw_opd: γ, extra weight of a response's first token
    retain: float = 0.5  # tip: share of a response's tokens that is trained on

    def __post_init__(self) -> None:
        one_of("weighting.name", self.name, ("none", "entropy_aware", "iw_opd", "tip"))
        between("weighting.entropy_threshold", self.entropy_threshold, 0)
        between("weighting.forward_k", self.forward_k, 1)
        between("weighting.gamma", self.gamma, 0)
        between("weighting.retain", self.retain, 0, 1, open_low=True)
