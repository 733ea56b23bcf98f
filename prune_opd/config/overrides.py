"""`dotted.key=value` settings of the command line, applied to a config.

They change the plain dictionary of the config, and the dataclasses are made again at the end: settings that only go
together may come one after the other.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from typing import Any, TypeVar

import yaml

from prune_opd.config import to_dict
from prune_opd.config.checks import bare, field_types, fits, is_list, is_part, may_be_none, wanted
from prune_opd.config.yaml import from_dict, parse
from prune_opd.errors import ConfigError

T = TypeVar("T")  # any frozen dataclass of settings


def apply_overrides(config: T, overrides: list[str]) -> T:
    """A copy of `config` with `dotted.key=value` settings applied in order; values are YAML (`null`, `true`, `1e-4`).

    Raises ConfigError for a key that does not exist (with the nearest one), a value of the wrong type, a setting inside
    a part that is null, and whatever the dataclasses refuse.
    """
    if not overrides:
        return config
    kind, tree = type(config), to_dict(config)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r} is not a setting: write it as dotted.key=value")
        node, name, hint = _find(kind, tree, key)
        node[name] = _value(key, text, hint)
    return typing.cast(T, from_dict(kind, tree))


def _find(kind: type, tree: dict[str, Any], key: str) -> tuple[Any, Any, Any]:
    """Where a dotted key is: the part that has it, its name (or place) there, and its annotation."""
    value: Any = tree
    hint: Any = kind
    names = key.split(".")
    for i, name in enumerate(names):
        if value is None:
            above = ".".join(names[:i])
            raise ConfigError(
                f"{key}: {above} is null, so it has no settings; leave out {above}=null, or set {above} in the recipe"
            )
        part, parts = value, _parts(hint, value)
        place = int(name) if name.isdecimal() else name
        if place not in parts:
            raise _unknown_key(dotted_keys(kind, tree), key)
        value, hint = part[place], parts[place]
    return part, place, hint


def _parts(annotated: Any, value: Any) -> dict[str | int, Any]:
    """The names (or the places in a tuple) one level below, each with its annotation. Empty for a plain value."""
    hint = bare(annotated)
    if dataclasses.is_dataclass(hint):
        return dict(field_types(hint).items())
    return dict.fromkeys(range(len(value or ())), typing.get_args(hint)[0]) if is_part(hint) else {}


def dotted_keys(annotated: Any, value: Any = None, prefix: str = "") -> list[str]:
    """Every setting that a config (or `value`, one as a dictionary) may have, parts before their settings.

    Those of a part that is null are among them.
    """
    keys = []
    for name, part in _parts(annotated, value).items():
        keys += [f"{prefix}{name}", *dotted_keys(part, None if value is None else value[name], f"{prefix}{name}.")]
    return keys


def _unknown_key(known: list[str], key: str) -> ConfigError:
    same_leaf = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = (
        difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        or difflib.get_close_matches(key, same_leaf, n=2, cutoff=0.0)
        or difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    )
    return ConfigError(f"there is no setting {key!r}: did you mean {' or '.join(near)}?")


def _value(key: str, text: str, annotated: Any) -> Any:
    """What a command line says a setting is. Raises ConfigError where that is not of its type."""
    if "${" in text:
        raise ConfigError(f"{key} = {text!r}: nothing is put in for ${{…}}; write the value itself")
    try:
        value = parse(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{key} = {text!r} is not valid YAML: quote the value, as in {key}='\"…\"'") from error
    hint = bare(annotated)
    if value is None:
        right = may_be_none(annotated)
    elif is_list(hint):
        value = value if isinstance(value, list) else [value]  # one is a list of one
        part = bare(typing.get_args(hint)[0])
        value = [_read(one, part) for one in value]
        right = fits(value, hint)
    elif fits("", hint):
        value, right = value if isinstance(value, str) else text, True  # a name like 12 or yes
    else:
        value = _read(value, hint)
        right = not is_part(hint) and fits(value, hint)
    if not right:
        raise ConfigError(f"{key} = {text!r} has the wrong type: give {wanted(key, annotated)}")
    return value


def _read(value: Any, hint: Any) -> Any:
    """A number in quotes, 1 for true, a list's names like 12: taken as what they are asked for."""
    if isinstance(value, str) and hint in (int, float):
        try:
            return hint(value)
        except ValueError:
            return value
    if hint is bool and type(value) is int:
        return bool(value)
    return str(value) if hint is str and isinstance(value, bool | int | float) else value
