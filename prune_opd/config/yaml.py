"""config.yaml: write a resolved config, read it back, and say where two differ."""

from __future__ import annotations

import os
import typing
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prune_opd.config import RunConfig, SftConfig, TrainConfig, to_dict
from prune_opd.config.overrides import _first_line, _is_list
from prune_opd.errors import ConfigError


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
