"""`prune-opd show` and `settings`: what a run is made of, and what can be set."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prune_opd.cli.complete import recipe_names, setting_names
from prune_opd.config.describe import DEFAULT, Setting, Value, matching, same, settings, values
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe

WIDTH = 200  # of tables that go to a file or a pipe
Recipe = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A name (see `prune-opd recipes`), a path to a file, or a run's config.yaml.",
        autocompletion=recipe_names,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings, such as horizon.strategy=full.", autocompletion=setting_names),
]


def show(
    recipe: Recipe,
    overrides: Overrides = None,
    diff: Annotated[
        str | None, typer.Option(metavar="OTHER|RUN", help="Only what differs from another recipe, or from a run.")
    ] = None,
    changed: Annotated[bool, typer.Option("--changed", help="Only what is not the default.")] = False,
) -> int:
    """Every setting of a run: its value, its default, who gave the value, and what it means."""
    written = load_recipe(recipe)
    config = apply_overrides(written, overrides or [])
    found = values(config, written)
    about = _meanings(type(config))
    if diff is not None:
        return _differences(found, values(other := load_recipe(diff), other), recipe, diff)
    table = _table("setting", "value", "default", "from", "meaning")
    section, shown = "", [one for one in found if not changed or one.source != DEFAULT]
    for one in shown:
        part = one.key.rpartition(".")[0]
        if part != section:
            table.add_section()
            if part in about:
                table.add_row(Text(part, style="bold"), "", "", "", Text(about[part], style="italic"))
            section = part
        table.add_row(*_cells(one))
    _print(table)
    return 0


def settings_(
    pattern: Annotated[
        str | None, typer.Argument(metavar="PATTERN", help="A piece of a name or of a meaning, or a paper's symbol.")
    ] = None,
) -> int:
    """What can be set: every setting with its type, default and meaning."""
    table = _table("setting", "type", "default", "meaning")
    for one in matching(pattern or ""):
        table.add_row(*map(Text, (one.name, one.type, one.default, one.meaning)))
    _print(table)
    return 0


def _differences(ours: list[Value], theirs: list[Value], name: str, other: str) -> int:
    """Print the settings in which two runs differ; 0 either way."""
    there = {one.key: one for one in theirs}
    here = {one.key: one for one in ours}
    keys = [*here, *(key for key in there if key not in here)]
    table = _table("setting", name, other, "meaning")
    differ = [key for key in keys if key not in here or key not in there or not same(here[key].value, there[key].value)]
    for key in differ:
        pair = (here.get(key), there.get(key))
        texts = [one.value if one else "–" for one in pair]
        meaning = next(one.meaning for one in pair if one)
        table.add_row(*map(Text, (key, *texts, meaning)))
    if differ:
        _print(table)
    else:
        print(f"{name} and {other} have the same settings")
    return 0


def _meanings(config: type) -> dict[str, str]:
    """Part → the first line of what its class says of itself."""
    found: dict[str, str] = {}

    def look(kind: type, prefix: str) -> None:
        for one in settings(kind):
            if one.part is not None:
                found[f"{prefix}{one.name}"] = _first_line(one)
                look(one.part, f"{prefix}{one.name}.")

    look(config, "")
    return found


def _first_line(part: Setting) -> str:
    return (part.part.__doc__ or "").partition("\n")[0] if part.part else ""


def _cells(one: Value) -> list[Text]:
    style = "" if one.source == DEFAULT else "bold"
    texts = [Text(one.key), Text(one.value, style=style), Text(one.default, style="bright_black")]
    return [*texts, Text(one.source, style="bright_black"), Text(one.meaning)]


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for place, name in enumerate(columns):
        table.add_column(name, overflow="fold", no_wrap=place == 0)
    return table


def _print(table: Table) -> None:
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(table)
