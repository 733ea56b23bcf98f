"""`dotted.key=value` settings of the command line, applied to a config.

Types are checked by OmegaConf's structured configs, values by the dataclasses themselves.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prune_opd.errors import ConfigError

T = TypeVar("T")  # any frozen dataclass of settings


def apply_overrides(config: T, overrides: list[str]) -> T:
    """A copy of `config` with `dotted.key=value` settings applied in order; values are YAML (`null`, `true`, `1e-4`).

    Raises ConfigError for a key that does not exist (with the nearest one), a value of the wrong type, a setting inside
    a part that is null, and whatever the dataclasses refuse.
    """
    if not overrides:
        return config
    tree = OmegaConf.structured(config)
    _unlock(tree)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r} is not a setting: write it as dotted.key=value")
        _set(tree, key, text)
    try:
        return typing.cast(T, OmegaConf.to_object(tree))
    except OmegaConfBaseException as error:
        raise ConfigError(f"overrides: {_first_line(error)}") from error


def _set(tree: DictConfig, key: str, text: str) -> None:
    expected = _expected_type(tree, key)
    value = _parse(key, text)
    plain = _without_none(expected)
    if plain is str and value is not None and not isinstance(value, str):
        value = text  # a name like 12 or yes
    if _is_list(plain) and value is not None and not isinstance(value, dict):
        value = value if isinstance(value, list) else [value]  # one is a list of one
    elif isinstance(value, dict | list) or (value is not None and _is_part(plain)):
        raise ConfigError(_wrong_type(key, text, expected))
    try:
        OmegaConf.update(tree, key, value)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(_wrong_type(key, text, expected)) from error


def _unlock(node: Any) -> None:
    """OmegaConf makes frozen dataclasses read-only, part by part; an override changes a copy."""
    if not OmegaConf.is_config(node) or node._is_none():
        return
    node._set_flag("readonly", False)
    for child in node if isinstance(node, DictConfig) else range(len(node)):
        _unlock(node._get_node(child))


def _is_part(hint: Any) -> bool:
    """Whether a type is made of further settings: another dataclass, or a tuple of them."""
    return dataclasses.is_dataclass(hint) or (typing.get_origin(hint) is tuple and not _is_list(hint))


def _is_list(hint: Any) -> bool:
    """Whether a type is a tuple of plain values, which is set as a whole: `evaluation.sources=[a.jsonl,b.jsonl]`."""
    return typing.get_origin(hint) is tuple and not dataclasses.is_dataclass(typing.get_args(hint)[0])


def _parts(hint: Any, node: Any) -> dict[str | int, Any]:
    """The names (or the places in a tuple) one level below, each with its annotated type. Empty for a plain value."""
    if dataclasses.is_dataclass(hint):
        return {name: part for name, part in typing.get_type_hints(hint).items()}
    if typing.get_origin(hint) is tuple and not _is_list(hint) and node is not None:
        return dict.fromkeys(range(len(node)), typing.get_args(hint)[0])
    return {}


def _expected_type(tree: DictConfig, key: str) -> Any:
    """The annotated type of a dotted key. Raises ConfigError if there is no such key, or if a part above it is null."""
    hint: Any = OmegaConf.get_type(tree)
    node: Any = tree
    names = key.split(".")
    for i, name in enumerate(names):
        above = ".".join(names[:i])
        if node is None:
            raise ConfigError(
                f"{key}: {above} is null, so it has no settings; leave out {above}=null, or set {above} in the recipe"
            )
        place = int(name) if name.isdecimal() else name
        parts = _parts(_without_none(hint), node)
        if place not in parts:
            raise _unknown_key(tree, key)
        hint, node = parts[place], node[place]
    return hint


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    return hint


def _unknown_key(tree: DictConfig, key: str) -> ConfigError:
    known = _dotted_keys(OmegaConf.get_type(tree), tree)
    same_leaf = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = (
        difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        or difflib.get_close_matches(key, same_leaf, n=2, cutoff=0.0)
        or difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    )
    return ConfigError(f"there is no setting {key!r}: did you mean {' or '.join(near)}?")


def _dotted_keys(hint: Any, node: Any, prefix: str = "") -> list[str]:
    """Every dotted key, parts before their settings; also those of a part that is null."""
    keys = []
    for name, part in _parts(hint, node).items():
        below = _dotted_keys(_without_none(part), None if node is None else node[name], f"{prefix}{name}.")
        keys += [f"{prefix}{name}", *below]
    return keys


def _parse(key: str, text: str) -> Any:
    """A value as OmegaConf reads one from its own dotlists: YAML, with `1e-4` a number."""
    try:
        return typing.cast(Any, OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"])))["value"]
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{key} = {text!r} is not valid YAML: quote the value, as in {key}='\"…\"'") from error


def _wrong_type(key: str, text: str, expected: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
    plain = _without_none(expected)
    if dataclasses.is_dataclass(plain):
        wanted = f"its settings one by one, as in {key}.{dataclasses.fields(plain)[0].name}=…"
    elif _is_list(plain):
        wanted = f"{names.get(typing.get_args(plain)[0], 'a value')} or several, as in {key}=[…,…]"
    else:
        wanted = names.get(plain, f"its settings one by one, as in {key}.0.…=…")
    or_null = "" if plain is expected else ", or null"
    return f"{key} = {text!r} has the wrong type: give {wanted}{or_null}"


def _first_line(error: Exception) -> str:
    """OmegaConf puts the message in the first line and its own bookkeeping in the others."""
    return str(error).partition("\n")[0]
