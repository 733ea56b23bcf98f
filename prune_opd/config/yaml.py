"""Settings as YAML and back: a resolved config in config.yaml, one value on a command line, and where two differ."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from prune_opd.config import RunConfig, SftConfig, TrainConfig, to_dict
from prune_opd.config.checks import bare, field_types, fits, is_named, is_part, may_be_none, wanted
from prune_opd.errors import ConfigError, for_all, located

C = TypeVar("C")  # a dataclass of settings


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `1e-4` is a number (YAML 1.1 wants a dot in it), and a date is a text."""


class _Dumper(yaml.SafeDumper):
    """YAML has no tuple: a list."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
for _kind in (_Loader, _Dumper):  # the one reads 1e-4 as a number, so the other puts a text like that in quotes
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)
_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, _style(text)))


def _style(text: str) -> str | None:
    """Double quotes for line ends of Unicode, which YAML would fold into a space."""
    return '"' if re.search("[\x85\u2028\u2029]", text) else None


def parse(text: str) -> Any:
    """A value from its YAML: `null`, `true`, `1e-4`, `[a, b]`, a text. Raises yaml.YAMLError and nothing else."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:  # of `!!int ''`, 0x_, a, []…
        raise yaml.YAMLError(f"not a value: {error}") from error
    if _holds_itself(value, frozenset(), set()):
        raise yaml.YAMLError("a value that holds itself, by its own anchor")
    return value


def _holds_itself(value: Any, above: frozenset[int], done: set[int]) -> bool:
    if not isinstance(value, dict | list) or id(value) in done:
        return False
    if id(value) in above:
        return True
    parts = value.values() if isinstance(value, dict) else value
    found = any(_holds_itself(part, above | {id(value)}, done) for part in parts)
    done.add(id(value))
    return found


def on_one_line(value: Any) -> str:
    """A value on one line, as YAML writes it."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1_000_000
    )
    return text.removesuffix("\n...\n").strip()


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config as YAML in the order of the dataclasses; a reader never sees half a file."""
    text = yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def load_config(path: Path) -> RunConfig:
    """Read what `save_config` wrote (an `SftConfig` is told by its `stages`). Raises ConfigError with the path."""
    try:
        data = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} does not hold the settings of a run")
    kind: type[RunConfig] = SftConfig if "stages" in data else TrainConfig
    return config_from_dict(kind, data, path)


# Settings that only a benchmark used and that have left the config, with the value that every other run wrote down.
GONE: dict[tuple[str, str], Any] = {
    ("horizon", "windows"): [],
    ("horizon", "scatter"): False,
    ("evaluation", "problems_between"): None,
}


def config_from_dict(kind: type[C], data: Any, path: Path) -> C:
    """A config as `to_dict` has it. Raises ConfigError with `path`, where it is from."""
    try:
        config: C = from_dict(kind, _without_gone(data))
        return config
    except ConfigError as error:
        raise located(path, error) from error


def _without_gone(data: Any) -> Any:
    """An older version's settings without what is not there any more, where it did nothing."""
    if not isinstance(data, dict):
        return data
    data = dict(data)
    for (part, name), idle in GONE.items():
        settings = data.get(part)
        if isinstance(settings, dict) and name in settings and settings[name] == idle:
            data[part] = {key: value for key, value in settings.items() if key != name}
    return data


def from_dict(kind: Any, data: Any, prefix: str = "") -> Any:
    """A settings dataclass from what `to_dict` makes of one.

    prefix: the dotted name of these settings in the whole config and a dot, for the messages.

    Raises ConfigError for a setting that there is not, one that is missing, a value of the wrong type, and whatever the
    dataclasses refuse.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{data!r} stands where the settings of a {kind.__name__} belong")
    hints = field_types(kind)

    def read(name: Any) -> Any:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.0)
            raise ConfigError(f"there is no setting {f'{prefix}{name}'!r}: did you mean {prefix}{near[0]}?")
        return _value(f"{prefix}{name}", data[name], hints[name])

    values = for_all(read, data)
    for field in dataclasses.fields(kind):
        if field.name not in data and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{prefix}{field.name} is not set, and it has no default: give it a value")
    return kind(**dict(zip(data, values, strict=True)))


def _value(key: str, value: Any, annotated: Any) -> Any:
    hint = bare(annotated)
    if value is None and may_be_none(annotated):
        return None
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, f"{key}.")
    if is_named(hint) and isinstance(value, dict):
        part = typing.get_args(hint)[1]
        return {name: _named(f"{key}.{name}", part, one) for name, one in value.items()}
    if is_part(hint) and isinstance(value, list | tuple):
        part = typing.get_args(hint)[0]
        return tuple(from_dict(part, one, f"{key}.{place}.") for place, one in enumerate(value))
    if not fits(value, hint):
        raise ConfigError(f"{key} = {value!r} has the wrong type: give {wanted(key, annotated)}")
    return as_type(value, hint)


def _named(key: str, part: Any, value: Any) -> Any:
    """One of several settings of a kind. What its dataclass refuses is found by its name."""
    try:
        return from_dict(part, value, f"{key}.")
    except ConfigError as error:
        raise error if key in str(error) else located(key, error) from error


def as_type(value: Any, hint: Any) -> Any:
    """A value that `fits`, as the dataclass has it: a whole number as a float where it is one, a list as a tuple."""
    if typing.get_origin(hint) is tuple:
        return tuple(as_type(one, bare(typing.get_args(hint)[0])) for one in value)
    return float(value) if hint is float else value


def config_differences(old: RunConfig, new: RunConfig) -> list[str]:
    """One `field: old → new` for every setting that differs, in the order of the dataclasses."""
    if type(old) is not type(new):
        return [f"kind: {type(old).__name__} → {type(new).__name__}"]
    return _differences(to_dict(old), to_dict(new), "")


def _differences(old: Any, new: Any, key: str) -> list[str]:
    if isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        prefix = f"{key}." if key else ""
        both = [name for name in old if name in new]
        lines = [line for name in both for line in _differences(old[name], new[name], f"{prefix}{name}")]
        one = [name for name in (*old, *new) if (name in old) != (name in new)]  # of several by name
        return lines + [f"{prefix}{name}: {_shown(old, name)} → {_shown(new, name)}" for name in one]
    return [] if old == new else [f"{key}: {on_one_line(old)} → {on_one_line(new)}"]


def _shown(parts: dict[str, Any], name: str) -> str:
    """The first setting of a named part, which tells it from others; null if there is no such part."""
    return on_one_line(next(iter(parts[name].values())) if name in parts else None)
