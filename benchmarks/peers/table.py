"""What `prune-opd bench peers` prints of its result."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

MIB = 2**20


def print_result(result: dict[str, Any], console: Console) -> None:
    settings, environment = result["settings"], result["environment"]
    console.print(
        f"{result['recipe']}, {settings['steps']} updates, the first {settings['warmup']} of each contender not timed, "
        f"turns of {settings['turn']}; {environment['cpus']} CPUs, load average "
        f"{environment['load_average_before'][0]:.1f} → {environment['load_average_after'][0]:.1f}"
    )
    console.print(_rates(result))
    console.print(_accuracies(result))
    for target in result["targets"]:
        console.print(f"  {'[green]pass[/]' if target['reached'] else '[red]miss[/]'}  {target['text']}")
    console.print(
        f"  {'[green]yes[/]' if result['trl_learned'] else '[red]no[/]'}   TRL's student learned (3 standard errors)"
    )


def _rates(result: dict[str, Any]) -> Table:
    table = Table(title="a whole step", title_justify="left")
    columns = ("", "tokens/s", f"÷ {result['best_trl']}", "step s", "CPU s / 1000 tokens", "peak memory MiB", "steps")
    for column in (*columns, "our phases, s"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in result["contenders"].items():
        phases = ", ".join(f"{phase.removeprefix('time_')} {time:.2f}" for phase, time in row["phases_s"].items())
        table.add_row(
            name,
            f"{row['tokens_per_s']:.0f}",
            f"{result['ratios'][name]:.2f}",
            f"{row['step_s']:.2f}",
            f"{row['cpu_s_per_1000_tokens']:.3f}",
            f"{row['peak_bytes'] / MIB:.0f}",
            str(row["timed_steps"]),
            phases,
        )
    return table


def _accuracies(result: dict[str, Any]) -> Table:
    table = Table(title=f"accuracy, {result['settings']['problems']} held-out problems at T = 1", title_justify="left")
    steps = [point["step"] for point in next(iter(result["curves"].values()))]
    at_equal = f"after {result['equal_tokens']:,} tokens"
    for column in ("", *(f"{step} updates" for step in steps), "tokens at the end", at_equal):
        table.add_column(column, justify="right" if column else "left")
    for name, curve in result["curves"].items():
        cells = [f"{100 * point['accuracy']:.1f} ± {100 * point['stderr']:.1f} %" for point in curve]
        equal = f"{100 * result['accuracy_at_equal_tokens'][name]:.1f} %"
        table.add_row(name, *cells, f"{curve[-1]['tokens']:,}", equal)
    return table
