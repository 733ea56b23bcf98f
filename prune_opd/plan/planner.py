"""A plan: does the recipe fit, how long does a step take, what does the run cost, with pruning and without it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from prune_opd.config import TrainConfig
from prune_opd.config.teachers import own_names
from prune_opd.model_spec import model_config
from prune_opd.plan.fit import problems
from prune_opd.plan.layout import layout_problems
from prune_opd.plan.lengths import assumptions, mean_horizon, steps_by_horizon, strategies
from prune_opd.plan.memory import MemoryPlan, plan_memory
from prune_opd.plan.setting import Setting, setting_of
from prune_opd.plan.time import StepTime, evaluation_seconds, mean_step, step_time

MODELS = ("student", "teacher")
CURVE_GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Plan:
    """steps: the mean step by strategy, the recipe's own first. evaluation: seconds of one evaluation."""

    setting: Setting
    problems: tuple[str, ...]  # empty: it fits
    memory: MemoryPlan
    steps: dict[str, StepTime]  # by strategy
    evaluation: float
    assumptions: tuple[str, ...]

    @property
    def planned(self) -> StepTime:
        """The mean step of the recipe's own strategy."""
        return self.steps[self.setting.config.horizon.strategy]

    @property
    def full(self) -> StepTime:
        """The mean step with full rollouts."""
        return self.steps["full"]

    @property
    def evaluations(self) -> int:
        """How many evaluations the run has: one before it, one after it, and those between."""
        config = self.setting.config
        if not config.evaluation.problems:
            return 0
        between = (config.steps - 1) // config.evaluation.every if config.evaluation.every else 0
        return 2 + between

    def hours(self, step: StepTime) -> float:
        return (step.total * self.setting.config.steps + self.evaluations * self.evaluation) / 3600

    def gpu_hours(self, step: StepTime) -> float:
        return self.hours(step) * self.setting.world

    def to_dict(self) -> dict[str, Any]:
        """What goes into plan.json: bytes, seconds, hours."""
        memory, setting = self.memory, self.setting
        return {
            "recipe": setting.config.name,
            "gpu": setting.gpu.name,
            "gpus": setting.world,
            "fits": not self.problems,
            "problems": list(self.problems),
            "assumptions": list(self.assumptions),
            "memory": {
                "parts": memory.parts,
                "phases": {phase: memory.total(phase) for phase in memory.resident},
                "limit": memory.limit,
            },
            "steps": {
                name: {
                    "horizon": step.horizon,
                    "seconds": step.seconds,
                    "tokens": step.tokens,
                    "hours": self.hours(step),
                    "gpu_hours": self.gpu_hours(step),
                }
                for name, step in {"planned": self.planned, **self.steps}.items()
            },
        }


def plan_run(config: TrainConfig, gpu: str, nodes: int) -> Plan:
    """The plan of a recipe on `nodes` × parallel.nproc GPUs. Raises `ConfigError` for an unknown GPU or model."""
    setting = setting_of(config, gpu, nodes)
    memory = plan_memory(setting)
    return Plan(
        setting=setting,
        problems=(*structure(config, setting.world), *problems(setting, memory)),
        memory=memory,
        steps={
            name: mean_step(setting, steps_by_horizon(config), memory.cache_tokens)
            for name, config in strategies(config).items()
        },
        evaluation=evaluation_seconds(setting, memory.cache_tokens),
        assumptions=tuple(assumptions(config)),
    )


def structure(config: TrainConfig, world: int) -> list[str]:
    """Why the layout cannot be, a line each (plan/layout.py)."""
    found: list[str] = []
    for name, own in config.by_teacher.items():
        models = {role: model_config(role, own.model_dirs[role]) for role in MODELS}
        found += [own_names(name, problem) for problem in layout_problems(own, world, models)]
    return list(dict.fromkeys(found))


def curve(config: TrainConfig, gpu: str, grow: bool) -> dict[int, StepTime]:
    """A step at the mean horizon, by number of GPUs: from 8, or the recipe's own if that is less, to 1024.

    The recipe's own number and its doubles are among them. Numbers that the layout does not divide are left out.

    grow: the prompts of a step grow with the GPUs, from the recipe's number on its own nodes. Otherwise they stay the
    recipe's, and numbers of GPUs for which they are too few are left out as well.
    """
    own = config.planning.nodes * config.parallel.nproc
    doubled = {own * 2**i for i in range(11) if i == 0 or own * 2**i <= CURVE_GPUS[-1]}
    found = {}
    for gpus in sorted({*CURVE_GPUS, *doubled}):
        nodes, rest = divmod(gpus, config.parallel.nproc)
        prompts = max(config.rollout.prompts * gpus // own, 1) if grow else config.rollout.prompts
        sized = replace(config, rollout=replace(config.rollout, prompts=prompts))
        if rest or not nodes or structure(sized, gpus):
            continue
        setting = setting_of(sized, gpu, nodes)
        memory = plan_memory(setting)
        if memory.cache_tokens > 0:
            found[gpus] = step_time(setting, mean_horizon(sized), memory.cache_tokens)
    return found
