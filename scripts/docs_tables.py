"""The tables that the docs take from the code: settings, metrics, commands, recipes. A hook of mkdocs (mkdocs.yml).

A page has `<!-- table: NAME -->` where a table goes when the site is built (`make docs`). The code is imported for it,
but nothing heavy: `.venv-docs` has no torch.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.strategies.kept import tables as comparison_tables  # noqa: E402
from prune_opd.config import SftConfig, TrainConfig  # noqa: E402
from prune_opd.config.describe import as_typed, settings  # noqa: E402
from prune_opd.track.metrics import meanings  # noqa: E402

TABLE = re.compile(r"<!-- table: ([a-z]+) -->")


# ---------------------------------------------------------------------------------------------------- settings


def settings_tables() -> str:
    return "\n\n".join([*_sections(TrainConfig, "", "The run"), *_sections(SftConfig, "", "Supervised training")])


def _sections(config: type, prefix: str, title: str) -> Iterator[str]:
    """A section for the dataclass, then one for each part that has no section yet (the layout is in both configs)."""
    found = settings(config)
    known = {one.part for one in settings(TrainConfig)} if prefix else set()  # their sections are there
    rows = [
        (f"`{prefix}{one.name}`", one.type, f"`{one.default}`" if one.default else "", as_typed(one.meaning))
        for one in found
        if one.part is None or one.part in known
    ]
    about = (inspect.getdoc(config) or "").partition("\n\n")[0].replace("\n", " ")
    yield f"## {title}\n\n{_escape(about)}\n\n" + _table(("setting", "type", "default", "meaning"), rows)
    for one in found:
        own = config is TrainConfig or prefix or one.name != "parallel"
        if one.part is not None and one.part not in known and own:
            several = "0." if one.type.startswith("list") else "NAME." if one.type.startswith("by name") else ""
            place = f"{prefix}{one.name}.{several}"
            yield from _sections(one.part, place, place.removesuffix("."))


# ---------------------------------------------------------------------------------------------------- the others


def metrics_table() -> str:
    return _table(("key", "meaning [unit]"), [(f"`{key}`", meaning) for key, meaning in meanings().items()])


def commands_tables() -> str:
    import typer

    from prune_opd.cli.main import app

    return "\n\n".join(_command(typer.main.get_command(app), "prune-opd"))


def _command(command: Any, path: str) -> Iterator[str]:
    if hasattr(command, "commands"):
        for name, below in command.commands.items():
            yield from _command(below, f"{path} {name}")
        return
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option"]
    usage = " ".join([path, *(_placeholder(one) for one in arguments)])
    rows = [(" ".join(f"`{name}`" for name in one.opts + one.secondary_opts), one.help or "") for one in options]
    rows = [(f"`{_placeholder(one)}`", one.help or "") for one in arguments] + rows
    text = f"## {path}\n\n    {usage}\n\n{command.help}"
    yield text + (f"\n\n{_table(('argument or option', 'meaning'), rows)}" if rows else "")


def _placeholder(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return f"[{name} …]" if not argument.required else f"{name} …" if argument.nargs == -1 else name


def recipes_table() -> str:
    from prune_opd.config.recipe import list_recipes

    return _table(("recipe", "what it is"), [(f"`{name}`", about) for name, about in list_recipes().items()])


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(_escape(cell) for cell in line) + " |" for line in lines)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<task>", "&lt;task&gt;") if "`" not in text else text.replace("|", "\\|")


# ---------------------------------------------------------------------------------------------------- pages

TABLES: dict[str, Callable[[], str]] = {
    "settings": settings_tables,
    "metrics": metrics_table,
    "commands": commands_tables,
    "recipes": recipes_table,
    "comparison": comparison_tables,
}


def filled(page: str) -> str:
    """A page with its tables as the code has them now."""
    return TABLE.sub(lambda found: TABLES[found[1]](), page)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What mkdocs asks of a hook, for every page."""
    return filled(markdown)
