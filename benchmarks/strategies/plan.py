"""What the comparison of strategies runs: methods as changes of one base, every run's config, the order of the runs.

The base is full OPD: the pair's recipe with full rollouts and a gate that weighs every token 1, so that overlap and
events are measured alike in all runs. A method is a list of overrides of it. What the recipe holds for the other
strategies (first window, step, γ, k, POPD's constants) stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common import rotated
from prune_opd.config import TrainConfig
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe
from prune_opd.errors import ConfigError

# No setting was chosen on the problems of these seeds, nor on their order of the training data, but one: that the
# window of `from_the_top` begins at its maximum, after tiny_compatible's first three seeds (docs/comparison.md).
FIRST_SEED, EVALUATION_SEEDS = 1001, 910_000
COST = ("rollout", "teacher", "train")  # the phases whose CPU seconds are what training costs

BASE = ("horizon.strategy=full", "horizon.finished_rows=miss", "gate.metric=overlap", "gate.w_drop=0", "gate.w_base=0")
W_DROP = "gate.w_drop={w_drop}"  # the recipe's
FIXED, MARGINAL = "horizon.strategy=topd", ("horizon.strategy=marginal", W_DROP)
PAPER = ("horizon.strategy=prune", W_DROP)
OURS = (*PAPER, "horizon.finished_rows=hit_if_reliable")
CHANGE_POINT = (*OURS, "gate.metric=change_point", "gate.k=16")  # the same on every pair
STOP = (
    "rollout.inflight.mode=gate",
    "rollout.inflight.schedule=fixed",
    "rollout.inflight.first_check={eighth}",
    "rollout.inflight.chunk={sixteenth}",
    "rollout.inflight.price=0.05",
)
# The rivals, in our reading (docs/choosing.md). Whatever their papers do not give is the recipe's, a default of the
# setting, or a share of max_len: an eighth. KAT's threshold is the pair's own, before any training: the largest of .1,
# .03, .01, .003 and .001 that stops at most 5 % of the teacher's own responses to 24 prompts of seed 77.
KAT_THRESHOLD = {"tiny_compatible": 0.001, "tiny_drift": 0.01, "tiny_trap": 0.01, "real_pair": 0.1}
# A pair whose recipe is too long for a comparison and names no constants of POPD: it is at full length after 16 steps.
SHORTER = {"real_pair": ("steps=20", "horizon.increment=8", "horizon.interval=4")}
KAT = ("gate.metric=kl_agreement", "gate.threshold={kat}", "gate.k=16", "gate.low_tokens={eighth}", "gate.w_drop=1")
SAMPLED, BASELINE = "objective.name=sampled_token", "objective.baseline=reverse_kl"
ONCE = "rollout.refresh_every=0"
FOLLOW = ("horizon.strategy=prune", "horizon.finished_rows=hit_if_reliable")
FASTOPD = ("horizon.strategy=fastopd", "horizon.step={eighth}", "horizon.margin={eighth}")
NO_MEMORY = (*FOLLOW, "gate.memory=false", "gate.w_drop=1")
STOP_AT_ALL = STOP[:-1]  # without a price: KAT looks always
RIVALS = "rivals"
TABLE = "table"  # what docs/comparison.md shows: one form of each idea, without the variants that others stand for


@dataclass(frozen=True)
class Method:
    """A row of the table. `changes`: overrides of the base, with {w_drop} and parts of max_len filled in."""

    name: str
    title: str
    changes: tuple[str, ...]
    against: str | None = None  # the method of the same seed that this one is compared with, beside full OPD
    replays: bool = False  # a control: it takes the windows that `against` had
    scatter: bool = False  # and cuts each response at random around them
    named_only: bool = False  # runs only when it is asked for
    group: str = ""  # the same for the methods of a group, which can be asked for by its name


METHODS = (
    Method("full", "full OPD", ()),
    Method("fixed", "fixed window, a third (the paper's 4096 of 12288)", (FIXED, "horizon.rho=0.3333")),
    Method("topd_10", "TOPD .10", (FIXED, "horizon.rho=0.1")),
    Method("topd_25", "TOPD .25", (FIXED, "horizon.rho=0.25")),
    Method("popd", "POPD", ("horizon.strategy=popd",)),
    Method("prune_paper", "Prune-OPD overlap, the paper's (w_base .5)", (*PAPER, "gate.w_base=0.5")),
    Method("prune_w0", "Prune-OPD overlap, w_base 0", PAPER),
    Method("prune", "Prune-OPD overlap, w_base 0, hit_if_reliable", OURS),
    Method("prune_top_p", "Prune-OPD top-p, w_base 0, hit_if_reliable", (*OURS, "gate.metric=teacher_top_p")),
    Method("change_point", "ours: change-point gate", CHANGE_POINT),
    Method(
        "change_point_inflight", "ours: change-point gate + in-flight stop", (*CHANGE_POINT, *STOP), named_only=True
    ),
    Method(
        "from_the_top",
        "ours: the same, the window begins at its maximum",
        (*CHANGE_POINT, *STOP, "horizon.init_len={longest}"),
        named_only=True,
    ),
    Method(
        "quantile",
        "ours: overlap below the pair's own γ",
        (*OURS, "gate.metric=overlap_quantile", "gate.k=16"),
        named_only=True,
    ),
    Method("acceptance", "ours: acceptance below .5", (*OURS, "gate.metric=acceptance", "gate.k=16"), named_only=True),
    Method("marginal", "ours: marginal window, w_base 0", MARGINAL),
    Method("marginal_paper", "ours: marginal window, w_base .5", (*MARGINAL, "gate.w_base=0.5")),
    Method("inflight", "Prune-OPD + in-flight stop (ours)", (*OURS, *STOP), "prune"),
    Method("full_gated", "full rollouts, the gate weighs", (W_DROP,), named_only=True),
    Method("inflight_full", "full rollouts + in-flight stop (ours)", (W_DROP, *STOP), "full_gated", named_only=True),
    Method("iw_opd", "IW-OPD", ("weighting.name=iw_opd",)),
    Method(
        "full_vocab",
        "full OPD, KL over the whole vocabulary",
        ("objective.name=full_vocab_reverse_kl",),
        named_only=True,
    ),
    Method(
        "semi_opd", "Semi-OPD: rollouts of the initial student", (ONCE, "rollout.correct_stale=false"), group=RIVALS
    ),
    Method("semi_opd_corrected", "Semi-OPD, stale tokens corrected", (ONCE,), group=RIVALS),
    Method("refresh_4", "rollouts of every fourth student", ("rollout.refresh_every=4",), group=RIVALS),
    Method("kat", "KAT: stops where the KL stays low", (*KAT, *STOP_AT_ALL), group=RIVALS),
    Method("kat_window", "KAT as a rule for the window", (*KAT, *FOLLOW), group=RIVALS),
    Method("adwin", "ADWIN: full-length probes", ("horizon.strategy=adwin", W_DROP), group=RIVALS),
    Method("fastopd", "Adaptive FastOPD: grows at plateaus", FASTOPD, group=RIVALS),
    Method("esr", "ESR, prefix OPD: the first 100 tokens", (FIXED, "horizon.rho={hundred}"), group=RIVALS),
    Method("sdar", "SDAR: a sigmoid of each token", ("weighting.name=sdar",), group=RIVALS),
    Method("tropd", "TrOPD: trust of each token", ("weighting.name=tropd",), group=RIVALS),
    Method("no_memory", "Prune-OPD without memory: events cost themselves", NO_MEMORY, "prune", group=RIVALS),
    Method("sampled", "full OPD, sampled token", (SAMPLED,), group=RIVALS),
    Method("vopd", "vOPD: the sampled token less its mean", (SAMPLED, BASELINE), "sampled", group=RIVALS),
    Method(
        "gamma_opd",
        "γOPD: credit of later tokens, γ .99",
        (SAMPLED, "objective.discount=0.99"),
        "sampled",
        group=RIVALS,
    ),
    Method("replay", "control: POPD that replays Prune's windows", (), "prune", replays=True),
    Method("random", "control: random cuts with the mean of Prune's windows", (), "prune", replays=True, scatter=True),
)

IN_TABLE = {
    *("full", "topd_25", "popd", "prune_paper", "prune_w0", "prune", "marginal_paper", "change_point", "from_the_top"),
    *("semi_opd", "semi_opd_corrected", "refresh_4", "kat", "kat_window", "adwin", "fastopd", "esr", "sdar", "tropd"),
    *("no_memory", "sampled", "vopd", "gamma_opd", "full_vocab", "replay", "random"),
}


@dataclass(frozen=True)
class Settings:
    """The size of the comparison."""

    problems: int = 512  # of the last evaluation
    problems_between: int = 128  # of those before: they only draw the curves
    evaluations: int = 3  # after the one at the start, the last one included
    # Of the recipes. Compiled engines make the same tokens for .55 of the CPU seconds; runs share what was compiled.
    overrides: tuple[str, ...] = ("rollout.enforce_eager=false",)


@dataclass(frozen=True)
class RunSpec:
    """One run. A control also needs the windows that it replays."""

    pair: str
    method: Method
    seed: int
    config: TrainConfig
    problems_between: int

    @property
    def key(self) -> str:
        """Its folder below the benchmark's."""
        return f"{self.pair}/{self.method.name}/{self.seed}"


def choose(names: Sequence[str] | None) -> list[Method]:
    """The methods that run, in the table's order: those named, or all, with full OPD and what they are compared with.

    ConfigError for a name that no method has.
    """
    known = {method.name: method for method in METHODS}
    groups = {RIVALS: {method.name for method in METHODS if method.group == RIVALS}, TABLE: IN_TABLE}
    for name in names or ():
        if name not in {**known, **groups}:
            raise ConfigError(f"--methods {name!r} is not known: the methods are {', '.join([*known, *groups])}")
    if names:
        wanted = {member for name in names for member in groups.get(name, {name})} | {"full"}
    else:
        wanted = {method.name for method in METHODS if not method.named_only and not method.group} | {"full"}
    wanted |= {known[name].against or "full" for name in wanted}
    return [method for method in METHODS if method.name in wanted]


def pair_recipe(pair: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """The recipe of a pair. ConfigError for one that is no distillation or has no gate to measure with."""
    config = apply_overrides(load_recipe(pair), [*SHORTER.get(pair, ()), *overrides])
    if not isinstance(config, TrainConfig) or config.gate is None:
        raise ConfigError(
            f"pair {pair!r}: its recipe must be of a distillation with a gate; name one, like tiny_compatible"
        )
    if config.teachers:  # each has a window of its own, which no method would set, and no cuts are replayed
        raise ConfigError(
            f"pair {pair!r} has teachers = {', '.join(config.teachers)}: methods are compared on a pair with one "
            "teacher; name one, like tiny_compatible"
        )
    if config.teacher_cache.on:
        raise ConfigError(
            f"teacher_cache.mode = {config.teacher_cache.mode} with the pair {pair!r}: a run that finds another's rows "
            "would seem to cost less; set teacher_cache.mode=off"
        )
    return config


def method_config(recipe: TrainConfig, method: Method, common: Sequence[str] = ()) -> TrainConfig:
    """A method on a pair, with what is the same for all runs."""
    assert recipe.gate is not None  # pair_recipe has seen to it
    if method.scatter and recipe.rollout.oversample > 1:
        raise ConfigError(
            f"rollout.oversample = {recipe.rollout.oversample:g} with the method {method.name}: the responses with the "
            "shortest limits would be kept, and the cuts' mean would not be the window; set rollout.oversample=1"
        )
    longest = recipe.horizon.max_len
    values = {
        "w_drop": recipe.gate.w_drop,
        "longest": longest,
        "eighth": max(1, longest // 8),
        "sixteenth": max(1, longest // 16),
        "hundred": min(1.0, 100 / longest),
        "kat": KAT_THRESHOLD.get(recipe.name, 0.01),
    }
    return apply_overrides(recipe, [*(text.format(**values) for text in (*BASE, *method.changes)), *common])


def run_config(recipe: TrainConfig, method: Method, seed: int, settings: Settings) -> TrainConfig:
    """The config of one run: one rank, no files but its metrics, the benchmark's evaluation problems.

    Where the recipe has no problems, like the real pair's, the student is exported and judged (judged.py).
    """
    common = [
        f"name={recipe.name}-{method.name}",
        f"seed={seed}",
        "parallel.nproc=1",
        "evaluation.generations=0",
        "checkpoint.every=0",
        "checkpoint.last=false",
        f"checkpoint.export_hf={'false' if recipe.evaluation.problems else 'true'}",
        "track.wandb=disabled",
        "track.report=false",
    ]
    if recipe.evaluation.problems:
        common += [
            f"evaluation.seed={EVALUATION_SEEDS + seed}",
            f"evaluation.problems={settings.problems}",
            f"evaluation.every={-(-recipe.steps // settings.evaluations)}",
        ]
    return method_config(recipe, method, common)


def run_spec(pair: str, recipe: TrainConfig, method: Method, seed: int, settings: Settings) -> RunSpec:
    return RunSpec(pair, method, seed, run_config(recipe, method, seed, settings), settings.problems_between)


def plan(
    recipes: dict[str, TrainConfig], methods: Sequence[Method], seeds: Sequence[int], settings: Settings
) -> list[RunSpec]:
    """Every run of the comparison in the order in which they start.

    Seed after seed; within a seed method after method, each on every pair before the next, so that what the machine
    does falls on all of them; every seed begins two methods further on. A control comes after the run it replays.
    """
    specs = []
    for turn, seed in enumerate(seeds):
        order = sorted(rotated(methods, 2 * turn), key=lambda method: method.replays)  # stable: the controls go last
        specs += [run_spec(pair, recipes[pair], method, seed, settings) for method in order for pair in recipes]
    return specs


def sweep_plan(pair: str, recipe: TrainConfig, seeds: Sequence[int], settings: Settings) -> list[RunSpec]:
    """The sweeps' runs on one pair, each gate once; the recipe's own is among the methods and is not run again."""
    methods = {method.name: method for points in sweeps(recipe).values() for method in points.values()}
    return [
        run_spec(pair, recipe, method, seed, settings)
        for seed in seeds
        for method in methods.values()
        if method not in METHODS
    ]


def sweeps(recipe: TrainConfig) -> dict[str, dict[float, Method]]:
    """The sweeps of the gate's γ and k around Prune-OPD as the project has it: value → method."""
    assert recipe.gate is not None  # pair_recipe has seen to it
    own = (recipe.gate.k, recipe.gate.threshold)

    def method(k: int, threshold: float) -> Method:
        if (k, threshold) == own:
            return next(method for method in METHODS if method.name == "prune")
        changes = (*OURS, f"gate.k={k}", f"gate.threshold={threshold}")
        return Method(f"k_{k}_gamma_{threshold:g}", f"k = {k}, γ = {threshold:g}", changes)

    # With few candidates few values of γ differ (k = 2 knows overlaps of 0, .5 and 1): γ is swept at k = 8.
    return {
        "γ at k = 8": {threshold: method(8, threshold) for threshold in (0.3, 0.5, 0.7, 0.9)},
        "k": {k: method(k, own[1]) for k in (2, 4, 8, 16)},
    }
