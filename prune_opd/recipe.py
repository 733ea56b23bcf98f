"""Recipes and what the command line does to them: load, override, write to config.yaml, read back, compare.

A recipe is a Python file with one function, named like the file, that returns a `TrainConfig` or an `SftConfig`. Types
are checked by OmegaConf's structured configs, values by the dataclasses themselves.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import os
import traceback
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prune_opd.config import SftConfig, TrainConfig, to_dict
from prune_opd.errors import ConfigError
from prune_opd.paths import recipes_dir

RunConfig = TrainConfig | SftConfig
C = TypeVar("C", bound=RunConfig)
T = TypeVar("T")  # any frozen dataclass of settings


# ---------------------------------------------------------------------------------------------------- loading


def list_recipes() -> dict[str, str]:
    """Name → first line of the docstring, for every recipe of the repository. Runs none of them."""
    recipes = {}
    for path in sorted(recipes_dir().glob("[!_]*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        recipes[path.stem] = docstring.partition("\n")[0]
    return recipes


def load_recipe(name_or_path: str) -> RunConfig:
    """The config that a recipe returns: a name in `recipes/`, or the path of a .py file.

    Raises ConfigError if there is no such recipe (with the nearest names), if it cannot be run, or if it does not hold
    a function of its own name that returns a TrainConfig or an SftConfig.
    """
    path = _recipe_path(name_or_path)
    module = _run_file(path)
    function = getattr(module, path.stem, None)
    if not callable(function):
        raise ConfigError(f"recipe {path}: it has no function {path.stem}(); name the function like the file")
    try:
        config = function()
    except ConfigError as error:
        raise ConfigError(f"recipe {path}: {error}") from error
    except Exception as error:
        raise ConfigError(_failure(path, error)) from error
    if not isinstance(config, TrainConfig | SftConfig):
        raise ConfigError(
            f"recipe {path}: {path.stem}() returned {type(config).__name__}; return a TrainConfig or an SftConfig"
        )
    return config


def _recipe_path(name_or_path: str) -> Path:
    if name_or_path.endswith(".py") or os.sep in name_or_path:
        path = Path(name_or_path)
        if path.suffix != ".py" or not path.is_file():
            raise ConfigError(f"recipe {name_or_path}: there is no such .py file; give its path, or a name in recipes/")
        return path.resolve()
    known = list(list_recipes())
    if name_or_path not in known:
        near = difflib.get_close_matches(name_or_path, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the recipes are {', '.join(known)}"
        raise ConfigError(f"recipe {name_or_path!r} is not known: {hint}")
    return recipes_dir() / f"{name_or_path}.py"


def _run_file(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ConfigError as error:
        raise ConfigError(f"recipe {path}: {error}") from error
    except Exception as error:
        raise ConfigError(_failure(path, error)) from error
    return module


def _failure(path: Path, error: Exception) -> str:
    """One line for an exception that a recipe's own code raised, with the line of the recipe it came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    where = f" line {lines[-1]}" if lines else ""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"recipe {path}{where}: {type(error).__name__}: {' '.join(message.split())}"


# ---------------------------------------------------------------------------------------------------- overrides


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


# ---------------------------------------------------------------------------------------------------- config.yaml


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config as YAML in the order of the dataclasses; a reader never sees half a file."""
    text = yaml.safe_dump(_plain(to_dict(config)), sort_keys=False, allow_unicode=True, width=120)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def load_config(path: Path) -> RunConfig:
    """Read what `save_config` wrote (an `SftConfig` is told by its `stages`). Raises ConfigError with the path."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} does not hold the settings of a run")
    kind: type[RunConfig] = SftConfig if "stages" in data else TrainConfig
    return typing.cast(RunConfig, _from_dict(kind, data, path))


def config_from_dict(data: Any, path: Path) -> TrainConfig:
    """The config of a run as a checkpoint has it (`to_dict`). Raises ConfigError with `path`, where it is from."""
    return typing.cast(TrainConfig, _from_dict(TrainConfig, data, path))


def _from_dict(kind: Any, data: Any, path: Path) -> Any:
    """OmegaConf checks names and types, but leaves the parts of a tuple as dictionaries: those are made here first."""
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: {data!r} stands where the settings of a {kind.__name__} belong")
    data = dict(data)
    for name, hint in typing.get_type_hints(kind).items():
        if typing.get_origin(hint) is tuple and not _is_list(hint) and isinstance(data.get(name), list):
            part = typing.get_args(hint)[0]
            data[name] = tuple(_from_dict(part, item, path) for item in data[name])
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), data))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from error


def config_differences(old: RunConfig, new: RunConfig) -> list[str]:
    """One `field: old → new` for every setting that differs, in the order of the dataclasses."""
    if type(old) is not type(new):
        return [f"kind: {type(old).__name__} → {type(new).__name__}"]
    return _differences(_plain(to_dict(old)), _plain(to_dict(new)), "")


def _differences(old: Any, new: Any, key: str) -> list[str]:
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        prefix = f"{key}." if key else ""
        return [line for name in old for line in _differences(old[name], new[name], f"{prefix}{name}")]
    return [] if old == new else [f"{key}: {_flow(old)} → {_flow(new)}"]


def _flow(value: Any) -> str:
    """A value on one line, as YAML writes it."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1_000_000)
    return text.removesuffix("\n...\n").strip()


def _plain(value: Any) -> Any:
    """Tuples as lists: YAML has no tuple."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
