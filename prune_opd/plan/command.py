"""`prune-opd plan` and `prune-opd recipes`."""

from __future__ import annotations

from pathlib import Path

from prune_opd.config import TrainConfig
from prune_opd.config.recipe import list_recipes, load_recipe
from prune_opd.plan.planner import plan_run
from prune_opd.plan.search import best_layouts
from prune_opd.plan.show import digits, print_curve, print_found, print_plan, write_plan
from prune_opd.process import table_console


def run_plan(config: TrainConfig, gpu: str | None, nodes: int | None, search: bool, out: Path | None) -> int:
    """Print the plan; 1 if the run does not fit. gpu, nodes: None takes the recipe's."""
    gpu, nodes = gpu or config.planning.gpu, nodes or config.planning.nodes
    plan = plan_run(config, gpu, nodes)
    console = table_console()
    print_plan(plan, console)
    print_curve(plan, console)
    found = best_layouts(config, gpu, nodes) if search else []
    if search:
        print_found(found, console)
    if out is not None:
        write_plan(plan, found, out)
        print(out / "plan.png")
    return 1 if plan.problems else 0


def print_recipes() -> None:
    """A line for each recipe: name, GPUs, planned hours, models, what it is. Nothing is planned for a CPU."""
    lines = list_recipes()
    rows = [(name, *_cost(name), summary) for name, summary in lines.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=False)) + f"  {row[3]}")


def _cost(name: str) -> tuple[str, str]:
    """The GPUs of a recipe and its planned hours, or why it has none."""
    config = load_recipe(name)
    if not isinstance(config, TrainConfig) or config.planning.gpu == "cpu":
        return "CPU", ""
    planning = config.planning
    gpus = f"{planning.nodes * config.parallel.nproc} × {planning.gpu}"
    plan = plan_run(config, planning.gpu, planning.nodes)
    return gpus, f"{digits(plan.hours(plan.planned), 1)} h" if not plan.problems else "does not fit"
