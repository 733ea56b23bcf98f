"""A plan as a reader sees it: tables on the console, plan.json and plan.png."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prune_opd.plan.fit import largest_fit
from prune_opd.plan.planner import Plan, curve
from prune_opd.plan.search import Found
from prune_opd.plan.time import PHASES, StepTime

CURVES = {"growing batch": True, "fixed batch": False}
MOST_DECIMALS = 4


def digits(value: float, decimals: int) -> str:
    """A positive number with so many decimals, and with more where that would leave less than two digits of it."""
    if 0 < value < 10 ** (1 - decimals):
        decimals = min(MOST_DECIMALS, 1 - math.floor(math.log10(value)))
    return f"{value:.{decimals}f}"


def print_plan(plan: Plan, console: Console) -> None:
    setting = plan.setting
    console.print(f"{setting.config.name} on {setting.world} × {setting.gpu.name}", highlight=False)
    for line in plan.assumptions:
        console.print(f"assumed: {line}", highlight=False)
    console.print(_memory_table(plan))
    console.print(_time_table(plan))
    batch, length = largest_fit(setting)
    cache = plan.memory.cache_tokens
    console.print(
        f"largest that fits: parallel.microbatch_tokens {batch}, horizon.max_len {length}; "
        f"KV cache of an engine: {max(cache, 0):.0f} tokens",
        highlight=False,
    )
    for problem in plan.problems:
        console.print(f"does not fit: {problem}", highlight=False)
    if not plan.problems:
        console.print("fits")


def print_found(found: list[Found], console: Console) -> None:
    table = Table("s a step", "overrides", title="Fastest layouts that fit")
    for layout in found:
        table.add_row(digits(layout.seconds, 1), " ".join(layout.overrides))
    console.print(table if found else "no layout fits: take more nodes, or memory.* offloads")


def print_curve(plan: Plan, console: Console) -> None:
    """Seconds of a step by number of GPUs, with a batch that grows with them and with the recipe's own."""
    for grow in (True, False):
        steps = curve(plan.setting.config, plan.setting.gpu.name, grow)
        title = "batch grows with the GPUs" if grow else "the recipe's batch"
        table = Table("GPUs", *PHASES, "tokens/s", "GPU-h a step", "largest", title=f"Seconds of a step: {title}")
        for gpus, step in steps.items():
            seconds = [digits(step.seconds[phase], 1) for phase in PHASES]
            cost = digits(step.total * gpus / 3600, 2)
            table.add_row(str(gpus), *seconds, f"{step.tokens / step.total:.0f}", cost, step.longest)
        console.print(table)


def write_plan(plan: Plan, found: list[Found], out: Path) -> None:
    """plan.json and plan.png in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    curves = {name: curve(plan.setting.config, plan.setting.gpu.name, grow) for name, grow in CURVES.items()}
    record: dict[str, Any] = plan.to_dict()
    record["curves"] = {
        name: {gpus: {"seconds": step.seconds, "tokens": step.tokens} for gpus, step in steps.items()}
        for name, steps in curves.items()
    }
    record["search"] = [{"seconds": layout.seconds, "overrides": layout.overrides} for layout in found]
    (out / "plan.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _draw(plan, curves, out / "plan.png")


def _memory_table(plan: Plan) -> Table:
    memory = plan.memory
    table = Table("phase", "parts GB", "work GB", "total GB", title=f"Memory a GPU, of {memory.limit / 1e9:.1f} GB")
    for phase in memory.resident:
        numbers = (memory.resident[phase], memory.working[phase], memory.total(phase))
        peak = " (peak)" if phase == memory.peak_phase else ""
        table.add_row(f"{phase}{peak}", *(f"{number / 1e9:.1f}" for number in numbers))
    parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in memory.parts.items())
    table.caption = f"parts: {parts}"
    return table


def _time_table(plan: Plan) -> Table:
    steps = plan.steps
    table = Table("", *steps, title="Time of a step, and of the run, by strategy (the recipe's first)")
    for phase in PHASES:
        table.add_row(f"{phase} s", *(digits(step.seconds[phase], 1) for step in steps.values()))
    rows: dict[str, list[str]] = {
        "step s": [digits(step.total, 1) for step in steps.values()],
        "horizon": [f"{step.horizon:.0f}" for step in steps.values()],
        "response tokens/s": [f"{step.tokens / step.total:.0f}" for step in steps.values()],
        "run h": [digits(plan.hours(step), 1) for step in steps.values()],
        "run GPU-h": [digits(plan.gpu_hours(step), 0) for step in steps.values()],
    }
    for name, row in rows.items():
        table.add_row(name, *row)
    rollout = plan.setting.config.rollout
    unplanned = {"the in-flight gate": rollout.inflight.on, "over-sampling": rollout.oversample > 1}
    unplanned["reused rollouts"] = rollout.reuses
    table.caption = f"with {plan.evaluations} evaluations of {digits(plan.evaluation, 0)} s" + "".join(
        f"; without {what}, its costs and savings" for what, used in unplanned.items() if used
    )
    return table


def _draw(plan: Plan, curves: dict[str, dict[int, StepTime]], path: Path) -> None:
    """Memory by phase, seconds by phase, and both curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 9), constrained_layout=True)
    memory = plan.memory
    names = list(memory.resident)
    resident = [memory.resident[phase] / 1e9 for phase in names]
    axes[0, 0].bar(names, resident, label="parts")
    axes[0, 0].bar(names, [memory.working[phase] / 1e9 for phase in names], bottom=resident, label="work")
    axes[0, 0].axhline(memory.limit / 1e9, color="black", linestyle="--", label="limit")
    axes[0, 0].set(title="memory of a GPU [GB]")
    axes[0, 0].legend()
    steps = plan.steps
    bottom = dict.fromkeys(steps, 0.0)
    for phase in PHASES:
        axes[0, 1].bar(
            list(steps), [s.seconds[phase] for s in steps.values()], bottom=list(bottom.values()), label=phase
        )
        bottom = {name: bottom[name] + step.seconds[phase] for name, step in steps.items()}
    axes[0, 1].set(title="a step [s]")
    axes[0, 1].legend()
    for axis, (name, found) in zip(axes[1], curves.items(), strict=True):
        for phase in PHASES:
            axis.plot(list(found), [step.seconds[phase] for step in found.values()], marker="o", label=phase)
        axis.set(xscale="log", yscale="log", xlabel="GPUs", title=f"a step [s], {name}")
        for scale in (axis.xaxis, axis.yaxis):  # numbers as they are, where the default would write powers of ten
            scale.set_major_formatter("{x:g}")
            scale.set_minor_formatter("")
        axis.legend()
    figure.suptitle(f"{plan.setting.config.name} on {plan.setting.world} × {plan.setting.gpu.name}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
