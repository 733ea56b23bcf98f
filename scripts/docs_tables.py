"""The tables that the docs take from the code: settings, metrics, commands, recipes. A hook of mkdocs (mkdocs.yml).

A page has `<!-- table: NAME -->` where a table goes when the site is built (`make docs`). The code is imported for it,
but nothing heavy: `.venv-docs` has no torch.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from prune_opd.config import SftConfig, TrainConfig  # noqa: E402
from prune_opd.config.checks import bare, field_types, limits, may_be_none, range_in_words  # noqa: E402
from prune_opd.track.metrics import meanings  # noqa: E402

TABLE = re.compile(r"<!-- table: ([a-z]+) -->")


# ---------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Setting:
    """One field of a settings dataclass. `part` is the dataclass it is made of, if it has settings of its own."""

    name: str
    type: str
    default: str
    meaning: str
    part: type | None


def settings(config: type) -> list[Setting]:
    """The fields of a settings dataclass; a meaning is the comment beside, or right above, the field."""
    meanings = field_comments(config)
    hints = field_types(config)
    return [
        Setting(field.name, _type(hints[field.name]), _default(field), meanings[field.name], _part(hints[field.name]))
        for field in dataclasses.fields(config)
    ]


def field_comments(config: type) -> dict[str, str]:
    """Field → what its comments say, those right above it and those beside it; empty if there are none."""
    found: dict[str, list[str]] = {}
    above: list[str] = []
    for line in inspect.getsource(config).splitlines():
        code, _, comment = line.partition("# ")
        if code.startswith("    def "):
            break
        field = re.match(r"    ([a-z]\w*): ", code)
        if field:
            found[field[1]] = above
        if code.strip() and found:
            found[list(found)[-1]] += [comment] if comment else []
        above = [*above, comment] if comment and not code.strip() else []
    return {name: " ".join(comments).strip() for name, comments in found.items()}


def _as_typed(meaning: str) -> str:
    """A comment speaks Python; an override is YAML."""
    for python, typed in (("None", "null"), ("False", "false"), ("True", "true")):
        meaning = re.sub(rf"\b{python}\b", typed, meaning)
    return meaning


def _part(hint: Any) -> type | None:
    plain = [arg for arg in (bare(hint), *typing.get_args(bare(hint))) if dataclasses.is_dataclass(arg)]
    return typing.cast(type, plain[0]) if plain else None


def _type(hint: Any) -> str:
    """What a setting takes: its type with its range, or its choices."""
    names = {int: "integer", float: "number", bool: "true, false", str: "text"}
    plain, bounds = bare(hint), limits(hint)
    if typing.get_origin(plain) is tuple:
        found = f"list of {_type(typing.get_args(plain)[0])}"
    elif typing.get_origin(plain) is typing.Literal:
        found = ", ".join(typing.get_args(plain))
    else:
        found = names.get(plain, "settings") + (f" {range_in_words(bounds)}" if bounds else "")
    return found + (" or null" if may_be_none(hint) else "")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "" if field.default_factory is not dataclasses.MISSING else "required"
    if isinstance(field.default, float):
        return f"{field.default:g}"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def settings_tables() -> str:
    return "\n\n".join([*_sections(TrainConfig, "", "The run"), *_sections(SftConfig, "", "Supervised training")])


def _sections(config: type, prefix: str, title: str) -> Iterator[str]:
    """A section for the dataclass, then one for each part that has no section yet (the layout is in both configs)."""
    found = settings(config)
    rows = [
        (f"`{prefix}{one.name}`", one.type, f"`{one.default}`" if one.default else "", _as_typed(one.meaning))
        for one in found
        if one.part is None
    ]
    about = (inspect.getdoc(config) or "").partition("\n\n")[0].replace("\n", " ")
    yield f"## {title}\n\n{_escape(about)}\n\n" + _table(("setting", "type", "default", "meaning"), rows)
    for one in found:
        if one.part is not None and (config is TrainConfig or prefix or one.name != "parallel"):
            place = f"{prefix}{one.name}." + ("0." if one.type.startswith("list") else "")
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
}


def filled(page: str) -> str:
    """A page with its tables as the code has them now."""
    return TABLE.sub(lambda found: TABLES[found[1]](), page)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What mkdocs asks of a hook, for every page."""
    return filled(markdown)
