"""A config as a recipe that a person goes on with: Python, with a comment on every value that somebody may doubt."""

from __future__ import annotations

import dataclasses
from typing import Any

from prune_opd.config import TrainConfig

HEAD = '''"""{student} ← {teacher}, on {where}. Written by `prune-opd new`; yours to change.

    prune-opd check {name}.py        what does not fit, a line each
    prune-opd show {name}.py         every setting with its meaning
    prune-opd train {name}.py
"""

from prune_opd.config import (
{imports}
)


def {name}() -> TrainConfig:
    return TrainConfig(
        name={quoted_name},
        student={quoted_student},
        teacher={quoted_teacher},
        steps={steps},
'''
# Part → what a reader should know of it, before its line.
WHY = {
    "data": "Prompts: a .jsonl or .parquet file, or a task. suffix='…' is an instruction behind each problem.",
    "rollout": "Responses of a step: prompts × responses. gpu_memory_utilization is vLLM's share of each GPU.",
    "horizon": "The window: from init_len it follows how long responses stay reliable, between min_len and max_len.\n"
    "rho is for strategy=topd, increment and interval are for popd.",
    "gate": "Where the teacher is no longer trusted. The paper's k and threshold need a large vocabulary; w_base=0\n"
    "gives nothing to what comes after a drift, .5 is the choice for a pair that you do not know.",
    "objective": "ends=class: stop tokens of student and teacher are one outcome. Needed where the two differ.",
    "optimizer": "AdamW, constant rate.",
    "parallel": "The fastest layout that the planner found to fit: `prune-opd plan RECIPE --search` has others.",
    "precision": "bf16 with fp32 master weights. FP8: recipes/_large.py shows it.",
    "memory": "What leaves the GPU between phases: its memory is the KV cache's meanwhile.",
    "evaluation": "Accuracy before and after the run: sources=('problems.jsonl',) with answers, problems=256.",
    "checkpoint": "Steps between checkpoints. A run that is killed goes on from the last one.",
    "planning": "What a plan assumes; nothing in a run reads it. Put in what your metrics say.",
}

# Arguments that stand there even where they are the defaults: what people change first.
SHOWN = {
    "data": ("source",),
    "rollout": ("prompts", "responses", "max_prompt_len", "gpu_memory_utilization"),
    "horizon": ("strategy", "max_len", "min_len", "init_len"),
    "gate": ("k", "threshold", "w_drop", "w_base"),
    "optimizer": ("lr",),
    "parallel": ("nproc",),
    "precision": ("params",),
    "evaluation": ("problems",),
}
WIDE = 112  # characters of a line; a longer call has a line for each argument


def recipe_text(config: TrainConfig) -> str:
    """The source of a recipe whose function is named `config.name` and returns this config."""
    parts = {name: getattr(config, name) for name in WHY if dataclasses.is_dataclass(getattr(config, name))}
    written = {name: found for name, part in parts.items() if (found := _arguments(part, SHOWN.get(name, ())))}
    planning = config.planning
    where = "two CPU cores" if planning.gpu == "cpu" else f"{planning.nodes} × {config.parallel.nproc} {planning.gpu}"
    classes = sorted({type(parts[name]).__name__ for name in written} | {"TrainConfig"})
    text = HEAD.format(
        student=_plain(config.student),
        teacher=_plain(config.teacher),
        where=where,
        name=config.name,
        imports="\n".join(f"    {name}," for name in classes),
        quoted_name=_quoted(config.name),
        quoted_student=_quoted(config.student),
        quoted_teacher=_quoted(config.teacher),
        steps=config.steps,
    )
    for name, arguments in written.items():
        comment = "".join(f"        # {line}\n" for line in WHY[name].split("\n"))
        text += f"{comment}        {name}={type(parts[name]).__name__}({_in_lines(arguments)}),\n"
    return text + "    )\n"


def _arguments(part: Any, shown: tuple[str, ...]) -> list[str]:
    """`name=value` of the fields that are not the defaults, and of those that are shown anyway."""
    fields = [(one.name, getattr(part, one.name), one.default) for one in dataclasses.fields(part)]
    return [
        f"{name}={_quoted(value)}"
        for name, value, default in fields
        if (name in shown or value != default) and not dataclasses.is_dataclass(value)
    ]


def _in_lines(arguments: list[str]) -> str:
    line = ", ".join(arguments)
    if len(line) < WIDE - 30:
        return line
    return "".join(f"\n            {argument}," for argument in arguments) + "\n        "


def _quoted(value: Any) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, tuple):
        return "(" + "".join(f"{_quoted(one)}, " for one in value).rstrip() + ")"
    return repr(value)


def _plain(path: str) -> str:
    """The last two parts of a model's path, for the docstring."""
    return "/".join(path.replace("\\", "/").rstrip("/").split("/")[-2:])
