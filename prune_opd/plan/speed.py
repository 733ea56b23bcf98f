"""How fast a step was, phase by phase, beside what the plan says of that phase.

Counted are the floating-point operations of the models (MFU, not HFU: neither what recompute does again nor padding).
With f(L) a model's forward pass over L tokens (counts.flops_by_length), of a prompt of P tokens and a response of T:

    rollout   f(P + T) − f(P + stale)  of each response, and f(P) without the head once a prompt: its prefill is shared
    teacher   f(P + T − 1) without the head, of the prompt that the teacher reads
    train     3 × the student's f(P + T − 1) without the head, and the loss's heads at T tokens: three products with the
              student's, one with the teacher's; with adapters 2 × and two, and three with each of theirs
    MFU       operations / (seconds × ranks × peak)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property

from prune_opd.config import LoraConfig, TrainConfig
from prune_opd.config.lora import NO_LORA
from prune_opd.errors import ConfigError
from prune_opd.model_spec import ModelSpec
from prune_opd.plan.adapters import adapter_flops, backward_products
from prune_opd.plan.counts import flops_by_length
from prune_opd.plan.hardware import GPUS
from prune_opd.plan.memory import plan_memory
from prune_opd.plan.setting import Setting, resized, setting_of
from prune_opd.plan.time import step_time
from prune_opd.rollout.batch import Rollouts

PHASES = ("rollout", "teacher", "train")
PLANNED = {"sync": ("sync",), "rollout": ("rollout",), "teacher": ("teacher",), "train": ("train", "all-reduce")}


def peak_flops(config: TrainConfig) -> float | None:
    """FLOP/s of one rank's device at its best: `planning.peak_flops`, else bf16's of `planning.gpu`; None on a CPU."""
    gpu = GPUS.get(config.planning.gpu)
    return config.planning.peak_flops or (gpu.bf16 if gpu else None)


Teachers = ModelSpec | Mapping[str, ModelSpec]  # the teacher, or several by name


def step_flops(
    student: ModelSpec,
    teacher: Teachers,
    rollouts: Rollouts,
    known: Collection[int] = (),
    lora: LoraConfig = NO_LORA,
) -> dict[str, float]:
    """Floating-point operations of a step by phase, of all ranks together. known: rows the teacher did not compute."""
    whole, body = flops_by_length(student), flops_by_length(student, False)
    teachers = teacher if isinstance(teacher, Mapping) else dict.fromkeys(rollouts.teacher_B, teacher)
    bodies = {name: flops_by_length(spec, False) for name, spec in teachers.items()}
    rows = list(zip(rollouts.prompts, rollouts.responses, strict=True))
    rows += [(group.prompt, response) for group in rollouts.left for response in group.begun]
    prompts = {prompt.ids: len(prompt.ids) for prompt, row in rows if row.fresh or not row.ids}
    decoded = sum(whole(len(prompt.ids) + len(row.ids)) - whole(len(prompt.ids) + row.stale) for prompt, row in rows)
    lengths, theirs = ([max(n, 0) for n in of] for of in (rollouts.row_length_B, rollouts.teacher_row_length_B))
    passes, names = 1 + backward_products(lora), rollouts.teacher_B
    heads = passes * student.vocab_size * student.hidden * rollouts.tokens
    for name, tokens in zip(names, rollouts.length_B, strict=True):
        heads += teachers[name].vocab_size * teachers[name].hidden * tokens
    return {
        "rollout": decoded + sum(map(body, prompts.values())),
        "teacher": sum(bodies[names[row]](length) for row, length in enumerate(theirs) if row not in known),
        "train": passes * sum(map(body, lengths)) + adapter_flops(student, lora, sum(lengths)) + 2 * heads,
    }


class SpeedMeter:
    """Turns the seconds of a step into FLOP/s, MFU and tokens/s of each rank. ranks: of the job, one a device."""

    def __init__(self, config: TrainConfig, student: ModelSpec, teacher: Teachers, ranks: int) -> None:
        self.config, self.student, self.teacher, self.ranks = config, student, teacher, ranks
        self.peak = peak_flops(config)
        self._planned: dict[int, dict[str, float]] = {}

    def record(
        self, rollouts: Rollouts, horizon: int, seconds: Mapping[str, float], known: Collection[int] = ()
    ) -> dict[str, float]:
        """Its part of a step record. seconds: `time_rollout`, `time_teacher`, `time_train` and `time_step` at least.

        known: rows that the teacher did not compute.
        """
        flops = step_flops(self.student, self.teacher, rollouts, known, self.config.lora)
        flops["step"] = sum(flops.values())
        rows = sum(rollouts.row_length_B)
        read = sum(length for row, length in enumerate(rollouts.teacher_row_length_B) if row not in known)
        tokens = {"rollout": rollouts.generated, "teacher": read, "train": rows, "step": rollouts.generated}
        found: dict[str, float] = {}
        for phase, count in flops.items():
            device_seconds = max(seconds[f"time_{phase}"], 1e-9) * self.ranks
            found[f"flops_{phase}"] = count / device_seconds
            found[f"speed_{phase}"] = tokens[phase] / device_seconds
            if self.peak is not None:
                found[f"mfu_{phase}"] = count / device_seconds / self.peak
        for phase, planned in self.planned(horizon).items():
            found[f"planned_time_{phase}"] = planned
            if self.peak is not None and phase in PHASES and planned > 0:
                found[f"planned_mfu_{phase}"] = flops[phase] / (planned * self.ranks * self.peak)
        return found

    def planned(self, horizon: int) -> dict[str, float]:
        """Seconds of each phase that a plan gives a step at this horizon; none for a CPU, which cannot be planned."""
        if self._setting is None:
            return {}
        if horizon not in self._planned:
            setting, cache_tokens = self._setting
            step = step_time(setting, horizon, cache_tokens).seconds
            self._planned[horizon] = {name: sum(step[part] for part in parts) for name, parts in PLANNED.items()}
        return self._planned[horizon]

    @cached_property
    def _setting(self) -> tuple[Setting, float] | None:
        """The plan's setting, of the job as it is, and the tokens that an engine's cache holds."""
        if self.config.planning.gpu not in GPUS:
            return None
        try:
            setting = setting_of(self.config, self.config.planning.gpu, 1)
        except ConfigError:  # a run does not end because it cannot be planned
            return None
        setting = resized(setting, self.ranks)
        return setting, plan_memory(setting).cache_tokens
