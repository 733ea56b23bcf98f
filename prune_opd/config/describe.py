"""Every setting with its type, default and meaning, and where a config's values come from.

The code is the one source: a type is a field's annotation, a meaning the comment beside or right above the field. The
docs' tables (scripts/docs_tables.py), `prune-opd settings` and `prune-opd show` are made of this.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prune_opd.config import RunConfig, TrainConfig, to_dict
from prune_opd.config.checks import bare, field_types, is_named, limits, may_be_none, range_in_words
from prune_opd.config.overrides import SYMBOLS
from prune_opd.config.yaml import on_one_line
from prune_opd.errors import ConfigError

DEFAULT, RECIPE, COMMAND_LINE = "default", "recipe", "command line"


@dataclass(frozen=True)
class Setting:
    """One field of a settings dataclass."""

    name: str
    type: str
    default: str
    meaning: str
    part: Any  # the dataclass it is made of, if it has settings of its own


@dataclass(frozen=True)
class Value:
    """A setting of a config: its dotted name, its value and its default as YAML, and who gave the value."""

    key: str
    value: str
    default: str
    meaning: str
    source: str  # default | recipe | command line


def settings(config: type) -> list[Setting]:
    """The fields of a settings dataclass; a meaning is the comment beside, or right above, the field."""
    meanings = field_comments(config)
    hints = field_types(config)
    return [
        Setting(field.name, _type(hints[field.name]), _default(field), meanings[field.name], _part(hints[field.name]))
        for field in dataclasses.fields(config)
    ]


def all_settings(config: type = TrainConfig, prefix: str = "") -> Iterator[Setting]:
    """Every plain setting of a config with its dotted name, parts in the order of the dataclasses."""
    return (one for one in _with_parts(config, prefix) if one.part is None)


def _with_parts(config: type, prefix: str = "") -> Iterator[Setting]:
    for one in settings(config):
        yield dataclasses.replace(one, name=f"{prefix}{one.name}", meaning=as_typed(one.meaning))
        if one.part is not None:
            place = "0." if one.type.startswith("list") else "NAME." if one.type.startswith("by name") else ""
            yield from _with_parts(one.part, f"{prefix}{one.name}.{place}")


def matching(pattern: str) -> list[Setting]:
    """The settings whose name or meaning has `pattern` in it, or that a paper calls so. ConfigError: there are none."""
    known = list(all_settings())
    meant = SYMBOLS.get(pattern.lower())
    by_symbol = [one for one in known if one.name == meant]
    found = by_symbol or [one for one in known if pattern.lower() in one.name]
    found = found or [one for one in known if pattern.lower() in one.meaning.lower()]
    if not found:
        near = difflib.get_close_matches(pattern, [part for one in known for part in one.name.split(".")], n=1)
        hint = f"did you mean {near[0]}?" if near else "`prune-opd settings` lists them all"
        raise ConfigError(f"no setting has {pattern!r} in its name or meaning: {hint}")
    return found


def values(config: RunConfig, recipe: RunConfig) -> list[Value]:
    """Every setting of `config`. recipe: the same without what the command line has set."""
    now, before = _flat(to_dict(config)), _flat(to_dict(recipe))
    about = {one.name: one for one in _with_parts(type(config))}  # a part may be null
    found = []
    for key, value in now.items():
        if value == {}:  # of several by name, there are none
            continue
        one = about.get(re.sub(r"^teachers\.\w+\.", "teachers.NAME.", re.sub(r"\.\d+\.", ".0.", key)))
        text, default = on_one_line(value), one.default if one else ""
        changed = key not in before or on_one_line(before[key]) != text
        source = COMMAND_LINE if changed else DEFAULT if same(text, default) else RECIPE
        found.append(Value(key, text, default, one.meaning if one else "", source))
    return found


def same(value: str, default: str) -> bool:
    """Whether a value as YAML is the default as the tables write it (`1e-06` and `1.0e-06` are one number)."""
    try:
        return value == default or float(value) == float(default)
    except ValueError:
        return False


def _flat(tree: Any, key: str = "") -> dict[str, Any]:
    """Dotted name → value of a nested config; a part that is null is a value, and so is a list of plain ones."""
    below: Sequence[tuple[str, Any]] = ()
    if isinstance(tree, dict):
        below = list(tree.items())
    elif isinstance(tree, tuple | list) and tree and isinstance(tree[0], dict):
        below = [(str(place), part) for place, part in enumerate(tree)]
    if not below:
        return {key: tree}
    return {name: value for part, one in below for name, value in _flat(one, f"{key}.{part}" if key else part).items()}


# ---------------------------------------------------------------------------------------------------- out of the code


@functools.cache
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


def as_typed(meaning: str) -> str:
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
    elif is_named(plain):
        found = "by name: settings"
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
    return on_one_line(list(field.default) if isinstance(field.default, tuple) else field.default)
