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
from prune_opd.config.checks import bare, field_types, fits, is_list, is_named, is_part, may_be_none, wanted
from prune_opd.config.yaml import from_dict, parse
from prune_opd.errors import ConfigError, for_all

T = TypeVar("T")  # any frozen dataclass of settings

NULLS = ("null", "Null", "NULL", "~")  # YAML's
SYMBOLS = {  # what the papers call a setting
    "γ": "gate.threshold",
    "gamma": "gate.threshold",
    "τ": "weighting.entropy_threshold",
    "tau": "weighting.entropy_threshold",
    "m_0": "horizon.init_len",
    "h_0": "horizon.init_len",
    "δh": "horizon.increment",
    "δs": "horizon.interval",
}
ELSEWHERE = {  # what other recipes call a setting, or where it is none
    "parallel.tp": "did you mean parallel.tensor?",
    "parallel.tensor_parallel": "did you mean parallel.tensor?",
    "parallel.pp": "did you mean parallel.pipeline?",
    "parallel.cp": "did you mean parallel.context?",
    "parallel.ep": "did you mean parallel.expert?",
    "parallel.dp": "it is what is left of the ranks (--nproc) after the others",
    "batch_size": "did you mean rollout.prompts (of a step) or rollout.responses (of a prompt)?",
    "rollout.n": "did you mean rollout.responses?",
    "data.path": "did you mean data.source?",
    "evaluation.task": "did you mean evaluation.sources?",
    "evaluation.tasks": "did you mean evaluation.sources?",
    "gate.enabled": "gate=null switches the gate off",
    "run_dir": "it is the option --run-dir",
}


def apply_overrides(config: T, overrides: list[str]) -> T:
    """A copy of `config` with `dotted.key=value` settings applied in order; values are YAML (`null`, `true`, `1e-4`).

    A text that is not in quotes is taken as it stands, with the spaces around it.

    Raises ConfigError for a key that does not exist (with the nearest one), a value of the wrong type, a setting inside
    a part that is null, all of these in one, a line each; and for whatever the dataclasses refuse.
    """
    if not overrides:
        return config
    kind, tree = type(config), to_dict(config)
    for_all(lambda override: _apply(kind, tree, override), overrides)
    return typing.cast(T, from_dict(kind, tree))


def _apply(kind: type, tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if key.endswith(" ") or override == "=":
        raise ConfigError("settings have no spaces around their =: write dotted.key=value in one word")
    if not separator and override in dotted_keys(kind):
        raise ConfigError(
            f"override {override!r} is not a setting: write it as dotted.key=value; its meaning has "
            f"`prune-opd settings {override}`"
        )
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not a setting: write it as dotted.key=value")
    node, name, hint = _find(kind, tree, key)
    node[name] = _value(key, text, hint)


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
        if place not in parts and is_named(bare(hint)) and names[i + 1 :] == [first_setting(hint)]:
            part[place], parts = {}, {**parts, place: typing.get_args(bare(hint))[1]}  # one more by name
        if place not in parts:
            raise _unknown_key(dotted_keys(kind, tree), key)
        value, hint = part.get(place) if isinstance(part, dict) else part[place], parts[place]
    return part, place, hint


def _parts(annotated: Any, value: Any) -> dict[str | int, Any]:
    """The names (or the places in a tuple) one level below, each with its annotation. Empty for a plain value."""
    hint = bare(annotated)
    if dataclasses.is_dataclass(hint):
        return dict(field_types(hint).items())
    if is_named(hint):
        return dict.fromkeys(value or (), typing.get_args(hint)[1])
    return dict.fromkeys(range(len(value or ())), typing.get_args(hint)[0]) if is_part(hint) else {}


def first_setting(annotated: Any) -> str:
    """The first setting of each of several named parts, which a new one is given by: `teachers.NAME.path`."""
    return dataclasses.fields(typing.get_args(bare(annotated))[1])[0].name


def dotted_keys(annotated: Any, value: Any = None, prefix: str = "") -> list[str]:
    """Every setting that a config (or `value`, one as a dictionary) may have, parts before their settings.

    Those of a part that is null are among them.
    """
    keys = []
    for name, part in _parts(annotated, value).items():
        keys += [f"{prefix}{name}", *dotted_keys(part, None if value is None else value[name], f"{prefix}{name}.")]
    return keys


def _unknown_key(known: list[str], key: str) -> ConfigError:
    if key in ELSEWHERE:
        return ConfigError(f"there is no setting {key!r}: {ELSEWHERE[key]}")
    part, _, leaf = key.rpartition(".")
    symbols = difflib.get_close_matches(leaf.lower(), SYMBOLS, n=1, cutoff=0.8)
    meant = [SYMBOLS[symbol] for symbol in symbols if SYMBOLS[symbol] in known]
    if named := [name for name in meant if name.startswith(f"{part}.")]:
        return ConfigError(f"there is no setting {key!r}: did you mean {named[0]} (the papers' {symbols[0]})?")
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
    # With a dot it is meant to be a setting, not a part of the config that has settings.
    parts = {name.rpartition(".")[0] for name in known}
    leaves = [name for name in known if name not in parts] if part else known
    of_part = [name for name in leaves if part and name.startswith(f"{part}.")]
    near = (
        difflib.get_close_matches(key, of_part, n=1, cutoff=0.9)
        or difflib.get_close_matches(key, same_leaf, n=1, cutoff=0.8)
        or (meant + same_leaf[: len(meant)])
        or difflib.get_close_matches(key, same_leaf, n=2, cutoff=0.0)
        or difflib.get_close_matches(key, leaves, n=1, cutoff=0.0)
    )
    return ConfigError(f"there is no setting {key!r}: did you mean {' or '.join(near)}?")


def _value(key: str, text: str, annotated: Any) -> Any:
    """What a command line says a setting is. Raises ConfigError where that is not of its type."""
    if "${" in text:
        raise ConfigError(f"{key} = {text!r}: nothing is put in for ${{…}}; write the value itself")
    hint = bare(annotated)
    if hint is str and not _is_yaml(text, may_be_none(annotated)):
        return text
    try:
        value = parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key} = {text!r} is not valid YAML: quote the value, as in {key}='\"…\"'") from error
    if value is None:
        right = may_be_none(annotated)
    elif is_list(hint):
        if isinstance(value, str) and "," in value and value == text:
            several = ",".join(part.strip() for part in text.split(","))
            raise ConfigError(f"{key} = {text!r}: several are written in brackets, {key}=[{several}]")
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


def _is_yaml(text: str, may_be_null: bool) -> bool:
    """Whether a text is to be read as YAML: in quotes or null. YAML would strip all others, and cut them at ` #`."""
    return text.lstrip().startswith(("'", '"')) or text.strip() in NULLS or (may_be_null and not text)


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
