"""`prune-opd plan` and `prune-opd recipes`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from prune_opd.config import TrainConfig
from prune_opd.errors import UserError
from prune_opd.plan.planner import plan_run
from prune_opd.plan.search import best_layouts
from prune_opd.plan.show import print_curve, print_found, print_plan, write_plan
from prune_opd.recipe import list_recipes, load_recipe

WIDTH = 160  # of tables that go to a file or a pipe


def console_of() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def run_plan(config: TrainConfig, gpu: str | None, nodes: int | None, search: bool, out: Path | None) -> int:
    """Print the plan; 1 if the run does not fit. gpu, nodes: None takes the recipe's."""
    gpu, nodes = gpu or config.planning.gpu, nodes or config.planning.nodes
    plan = plan_run(config, gpu, nodes)
    console = console_of()
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
    """Name, models, GPUs and planned hours of every recipe; of supervised ones and those for a CPU, what they are."""
    table = Table("recipe", "student ← teacher", "GPUs", "planned h", "what it is", box=None, pad_edge=False)
    for name, summary in list_recipes().items():
        config = load_recipe(name)
        if not isinstance(config, TrainConfig):
            table.add_row(name, "", "CPU", "", summary)
            continue
        models = " ← ".join(Path(model).name for model in (config.student, config.teacher))
        table.add_row(name, models, *_cost(config), summary)
    console_of().print(table, highlight=False)


def _cost(config: TrainConfig) -> tuple[str, str]:
    planning = config.planning
    if planning.gpu == "cpu":
        return "CPU", ""
    gpus = f"{planning.nodes * config.parallel.nproc} × {planning.gpu}"
    try:
        plan = plan_run(config, planning.gpu, planning.nodes)
    except UserError as error:
        return gpus, f"? ({error})"
    return gpus, f"{plan.hours(plan.planned):.1f}"
