"""What the comparison of strategies runs: methods as changes of one base, every run's config, the order of the runs.

The base is full OPD: the pair's recipe with full rollouts and a gate that weighs every token 1, so that overlap and
events are measured alike in all runs. A method is a list of overrides of it. What the recipe holds for the other
strategies (first window, step, γ, k, POPD's constants) stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace

from prune_opd.config import RolloutConfig, TrainConfig
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe
from prune_opd.errors import ConfigError

# Of this benchmark alone: no setting was chosen on these seeds' problems, nor on their order of the training data.
FIRST_SEED, EVALUATION_SEEDS = 1001, 910_000

BASE = ("horizon.strategy=full", "horizon.finished_rows=miss", "gate.metric=overlap", "gate.w_drop=0", "gate.w_base=0")
W_DROP = "gate.w_drop={w_drop}"  # the recipe's
PAPER = ("horizon.strategy=prune", W_DROP)
OURS = (*PAPER, "horizon.finished_rows=hit_if_reliable")


@dataclass(frozen=True)
class Method:
    """A row of the table. `changes`: overrides of the base, with {w_drop} and parts of max_len filled in."""

    name: str
    title: str
    changes: tuple[str, ...]
    windows_of: str | None = None  # the method whose windows, realised with the same seed, this one replays


@dataclass(frozen=True)
class Point:
    """One point of a sweep of Prune-OPD (`SWEPT`): the gate's k and γ, None where the recipe's stays."""

    k: int
    threshold: float | None = None

    @property
    def method(self) -> Method:
        gamma = "" if self.threshold is None else f"_gamma_{self.threshold:g}"
        named = "" if self.threshold is None else f", γ = {self.threshold:g}"
        changes = () if self.threshold is None else (f"gate.threshold={self.threshold:g}",)
        return Method(f"k_{self.k}{gamma}", f"k = {self.k}{named}", (*OURS, f"gate.k={self.k}", *changes))


SWEPT = "prune"  # the project's own default: w_base 0, and a response that ends reliably is a hit
METHODS = (
    Method("full", "full OPD", ()),
    Method(
        "fixed", "fixed window, a third (the paper's 4096 of 12288)", ("horizon.strategy=topd", "horizon.rho=0.3333")
    ),
    Method("topd_10", "TOPD .10", ("horizon.strategy=topd", "horizon.rho=0.1")),
    Method("topd_25", "TOPD .25", ("horizon.strategy=topd", "horizon.rho=0.25")),
    Method("popd", "POPD", ("horizon.strategy=popd",)),
    Method("prune_paper", "Prune-OPD overlap, the paper's (w_base .5)", (*PAPER, "gate.w_base=0.5")),
    Method("prune_w0", "Prune-OPD overlap, w_base 0", PAPER),
    Method("prune", "Prune-OPD overlap, w_base 0, hit_if_reliable", OURS),
    Method("prune_top_p", "Prune-OPD top-p, w_base 0, hit_if_reliable", (*OURS, "gate.metric=teacher_top_p")),
    Method("marginal", "ours: marginal window, w_base 0", ("horizon.strategy=marginal", W_DROP)),
    Method(
        "marginal_paper", "ours: marginal window, w_base .5", ("horizon.strategy=marginal", W_DROP, "gate.w_base=0.5")
    ),
    Method(
        "inflight",
        "Prune-OPD + in-flight stop (ours)",
        (
            *OURS,
            "rollout.inflight.mode=gate",
            "rollout.inflight.schedule=fixed",
            "rollout.inflight.first_check={eighth}",
            "rollout.inflight.chunk={sixteenth}",
            "rollout.inflight.price=0.05",
        ),
    ),
    Method("iw_opd", "IW-OPD", ("weighting.name=iw_opd",)),
    Method("replay", "control: POPD that replays Prune's windows", ("horizon.strategy=replay",), windows_of="prune"),
    Method(
        "random",
        "control: random cuts with the mean of Prune's windows",
        ("horizon.strategy=replay", "horizon.scatter=true"),
        windows_of="prune",
    ),
)
# With few candidates few values of γ differ (k = 2 knows overlaps of 0, .5 and 1): γ is swept at k = 8.
SWEEPS = {
    "γ at k = 8": tuple(Point(8, threshold) for threshold in (0.3, 0.5, 0.7, 0.9)),
    "k": tuple(Point(k) for k in (2, 4, 8, 16)),
}


@dataclass(frozen=True)
class Settings:
    """The size of the comparison."""

    problems: int = 512  # of the last evaluation
    problems_between: int = 128  # of those before: they only draw the curves
    evaluations: int = 3  # after the one at the start, the last one included
    steps: int | None = None  # None: the recipe's
    prompts: int | None = None  # a step; None: the recipe's


@dataclass(frozen=True)
class RunSpec:
    """One run: `config` is complete but for the windows of a replay."""

    pair: str
    method: Method
    seed: int
    config: TrainConfig

    @property
    def key(self) -> str:
        """Its folder below the benchmark's."""
        return f"{self.pair}/{self.method.name}/{self.seed}"


def missing(method: Method) -> str | None:
    """Why a method cannot run in this version, None if it can."""
    has_inflight = any(field.name == "inflight" for field in dataclasses.fields(RolloutConfig))
    if method.name == "inflight" and not has_inflight:
        return "rollout.inflight does not exist in this version"
    return None


def choose(names: Sequence[str] | None) -> list[Method]:
    """The methods that run: all, or those named, in the table's order, with full OPD and what a control replays.

    ConfigError for a name that no method has.
    """
    known = {method.name: method for method in METHODS}
    for name in names or ():
        if name not in known:
            raise ConfigError(f"--methods {name!r} is not known: the methods are {', '.join(known)}")
    wanted = set(names or known) | {"full"}
    wanted |= {known[name].windows_of or "full" for name in wanted}
    return [method for method in METHODS if method.name in wanted and not missing(method)]


def pair_recipe(pair: str) -> TrainConfig:
    """The recipe of a pair. ConfigError for one that is no distillation or has no gate to measure with."""
    config = load_recipe(pair)
    if not isinstance(config, TrainConfig) or config.gate is None:
        raise ConfigError(
            f"pair {pair!r}: its recipe must be of a distillation with a gate; name one, like tiny_compatible"
        )
    return config


def method_config(recipe: TrainConfig, method: Method, common: Sequence[str] = ()) -> TrainConfig:
    """A method on a pair, with what is the same for all runs. A replay has placeholder windows."""
    assert recipe.gate is not None  # pair_recipe has seen to it
    longest = recipe.horizon.max_len
    values = {"w_drop": recipe.gate.w_drop, "eighth": max(1, longest // 8), "sixteenth": max(1, longest // 16)}
    if method.windows_of:
        recipe = replace(recipe, horizon=replace(recipe.horizon, windows=(recipe.horizon.max_len,)))
    return apply_overrides(recipe, [*(text.format(**values) for text in (*BASE, *method.changes)), *common])


def run_config(recipe: TrainConfig, method: Method, seed: int, settings: Settings) -> TrainConfig:
    """The config of one run: one rank, no files but its metrics, the benchmark's evaluation problems."""
    steps = settings.steps or recipe.steps
    common = [
        f"name={recipe.name}-{method.name}",
        f"steps={steps}",
        f"seed={seed}",
        f"rollout.prompts={settings.prompts or recipe.rollout.prompts}",
        "parallel.nproc=1",
        f"evaluation.seed={EVALUATION_SEEDS + seed}",
        f"evaluation.problems={settings.problems}",
        f"evaluation.problems_between={settings.problems_between}",
        f"evaluation.every={-(-steps // settings.evaluations)}",
        "evaluation.generations=0",
        "checkpoint.every=0",
        "checkpoint.last=false",
        "checkpoint.export_hf=false",
        "track.wandb=disabled",
        "track.report=false",
    ]
    return method_config(recipe, method, common)


def plan(
    recipes: dict[str, TrainConfig], methods: Sequence[Method], seeds: Sequence[int], settings: Settings
) -> list[RunSpec]:
    """Every run of the comparison in the order in which they start.

    Seed after seed; within a seed method after method, each on every pair before the next, so that what the machine
    does falls on all of them; every seed begins two methods further on. A control comes after the run it replays.
    """
    specs = []
    for turn, seed in enumerate(seeds):
        shift = 2 * turn % len(methods)
        order = [*methods[shift:], *methods[:shift]]
        order.sort(key=lambda method: method.windows_of is not None)  # stable: the controls go last
        for method in order:
            specs += [
                RunSpec(pair, method, seed, run_config(recipes[pair], method, seed, settings)) for pair in recipes
            ]
    return specs


def sweep_plan(pair: str, recipe: TrainConfig, seeds: Sequence[int], settings: Settings) -> list[RunSpec]:
    """The sweeps' runs on one pair. A point at the recipe's own gate is there already: it is the run of `SWEPT`."""
    methods = dict.fromkeys(swept_method(recipe, point) for points in SWEEPS.values() for point in points)
    return [
        RunSpec(pair, method, seed, run_config(recipe, method, seed, settings))
        for seed in seeds
        for method in methods
        if method.name != SWEPT
    ]


def swept_method(recipe: TrainConfig, point: Point) -> Method:
    """The method whose run is this point on a pair: `SWEPT` where the gate is the recipe's, and one for equal gates."""
    assert recipe.gate is not None  # pair_recipe has seen to it
    own = recipe.gate.threshold
    if point.k == recipe.gate.k and point.threshold in (None, own):
        return next(method for method in METHODS if method.name == SWEPT)
    return replace(point, threshold=None).method if point.threshold == own else point.method
