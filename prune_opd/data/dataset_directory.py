"""The files of a dataset directory: what `Dataset.save_to_disk` wrote, or a downloaded repository.

Of a repository the `configs` of its README.md count, if it has any; else splits are told by the names of files
(train-00000-of-00003.parquet) or folders (default/train/0000.parquet), as the Hugging Face libraries do. Several
configurations are several datasets, often with the same problems: none is taken for all of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from prune_opd.errors import ConfigError

# Names that mean a split wherever they stand, with the name that `data.split` has for it.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
NO_CONFIGURATION = ("data", "default")  # folders that are none


def dataset_files(path: Path, split: str | None, formats: Sequence[str]) -> list[Path]:
    """The files of the wanted split, in the order of their names.

    split: None takes the only one, or train. Raises ConfigError: there are none, the split is not there, or there are
    several configurations and the README.md names no default.
    """
    saved = path / "dataset_dict.json"
    if saved.is_file():
        chosen = _choose(path, json.loads(saved.read_text(encoding="utf-8"))["splits"], split)
        return dataset_files(path / chosen, None, formats)
    if (path / "state.json").is_file():
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if "_data_files" in state:
            return [path / part["filename"] for part in state["_data_files"]]
    if configured := _configured(path, formats):
        return configured[_choose(path, list(configured), split)]
    for suffix in reversed(formats):
        if files := _files(path, f"**/*{suffix}"):
            return _one_configuration(path, files, split)
    raise ConfigError(f"{path} has no {' or '.join(formats)} files and was not saved by datasets: give a file in it")


def _files(path: Path, pattern: str) -> list[Path]:
    found = (file for file in path.glob(pattern) if file.is_file())
    return sorted(file for file in found if not any(part[0] == "." for part in file.relative_to(path).parts))


def _one_configuration(path: Path, files: Sequence[Path], split: str | None) -> list[Path]:
    """Those of the wanted split, told by names. ConfigError if they lie in several configurations' folders."""
    splits = {file: _split_of(file.relative_to(path)) for file in files}
    folders: dict[str, list[Path]] = {}
    for file in files:
        parts = file.relative_to(path).parent.parts
        name = "/".join(part for part in parts if part not in NO_CONFIGURATION and part not in SPLITS)
        folders.setdefault(name, []).append(file)
    if len(folders) > 1:
        names = ", ".join(repr(name or ".") for name in folders)
        raise ConfigError(
            f"{path} has several configurations, {names}, which may hold the same problems: give the path of one, such "
            f"as {str(path / next(name for name in folders if name))!r}"
        )
    chosen = _choose(path, list(dict.fromkeys(splits.values())), split)
    return [file for file in files if splits[file] == chosen]


def _split_of(file: Path) -> str:
    """By a word in the file's name; else by its folders; else by that name up to a dash, whatever it is."""
    words = (*re.split(r"[-._ 0-9]+", file.stem), *reversed(file.parent.parts))
    named = [word.lower() for word in words if word.lower() in SPLITS]
    return SPLITS[named[0]] if named else file.stem.split("-")[0]


def _configured(path: Path, formats: Sequence[str]) -> dict[str, list[Path]]:
    """Split → files, of the default configuration of a README.md; {} where that says nothing of files.

    ConfigError if it has several configurations and none is the default, or names files that are not there.
    """
    configs = _readme_configs(path / "README.md")
    if not configs:
        return {}
    names = [str(config.get("config_name", "default")) for config in configs]
    default = [c for c, name in zip(configs, names, strict=True) if c.get("default") is True or name == "default"]
    if len(configs) > 1 and not default:
        raise ConfigError(
            f"{path} has several configurations, {', '.join(map(repr, names))}, which may hold the same problems, and "
            "its README.md names no default: give the path of one's files"
        )
    splits: dict[str, list[Path]] = {}
    for name, patterns in _patterns((default or configs)[0]["data_files"]):
        for pattern in patterns:
            splits.setdefault(name, []).extend(file for file in _files(path, pattern) if file.suffix in formats)
    return {name: files for name, files in splits.items() if files}


def _readme_configs(readme: Path) -> list[Mapping[str, Any]]:
    """The entries with `data_files` of a dataset card; none if it has no readable head."""
    try:
        head = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8"), re.S)
        configs = (yaml.safe_load(head[1]) or {}).get("configs") if head else None
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return []
    found = configs if isinstance(configs, list) else []
    return [config for config in found if isinstance(config, dict) and config.get("data_files")]


def _patterns(data_files: Any) -> list[tuple[str, list[str]]]:
    """(split, glob patterns) of `data_files`: patterns of the train split, or entries with path and split."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    found = []
    for entry in entries:
        part = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
        paths = part.get("path", [])
        patterns = [str(one) for one in (paths if isinstance(paths, list) else [paths])]
        found.append((str(part.get("split", "train")), [one.removeprefix("./") for one in patterns]))
    return found


def _choose(path: Path, splits: Sequence[str], split: str | None) -> str:
    """The split that is asked for; else the only one, or `train`."""
    if split is None and len(splits) == 1:
        return splits[0]
    wanted = split or "train"
    if wanted not in splits:
        wanted = SPLITS.get(wanted.lower(), wanted)  # dev, say, where the files are called validation
    if wanted not in splits:
        raise ConfigError(f"data.split = {split!r}: {path} has {', '.join(map(repr, splits))}; set data.split to one")
    return wanted
