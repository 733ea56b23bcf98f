"""The files of a dataset directory: what `Dataset.save_to_disk` wrote, or a downloaded repository.

The `datasets` library says which files of a repository belong to which split and configuration; rows.py reads them. It
is imported where such a directory is given and not before. Two things that it takes in silence are refused here, since
they train on wrong rows: several configurations' folders as one dataset (often the same problems twice), and a file
that is named for one split but counted to another (TEST.jsonl beside Train.jsonl: its words are in lower case).
"""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from glob import has_magic
from pathlib import Path
from typing import Any

import yaml

from prune_opd.errors import ConfigError

PIN = "datasets==5.2.0"
# Names that mean a split wherever they stand, with the name that `data.split` has for it.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
NO_CONFIGURATION = ("data", "default")  # folders that are none
Splits = dict[str, list[Path]]


def dataset_files(path: Path, split: str | None, formats: Sequence[str]) -> list[Path]:
    """The files of the wanted split, in the order that `datasets` reads them.

    split: None takes the only one, or train. Raises ConfigError: there are none, the split is not there, there are
    several configurations and no default, or a file's split is in doubt.
    """
    try:
        splits = _saved(path) or _repository(path, formats)
    except ConfigError:
        raise
    except Exception as error:  # whatever `datasets` meets in other people's cards and states
        raise ConfigError(
            f"{path} is no dataset directory that can be read ({' '.join(str(error).split())[:300]}): correct it, or "
            "give the path of a file in it"
        ) from error
    return splits[_choose(path, list(splits), split)]


def _saved(path: Path) -> Splits:
    """What `save_to_disk` wrote, {} if it did not. Its two files of names say all: no dataset has to be opened."""
    both, state = path / "dataset_dict.json", path / "state.json"
    if both.is_file():
        names = json.loads(both.read_text(encoding="utf-8"))["splits"]
        parts = {name: _saved(path / name) for name in names}
        if missing := [name for name, part in parts.items() if not part]:
            raise ConfigError(
                f"{path} lacks {missing[0]!r}, a split that its dataset_dict.json names: copy it there too"
            )
        return {name: files for name, part in parts.items() for files in part.values()}
    said = json.loads(state.read_text(encoding="utf-8")) if state.is_file() else {}
    if "_data_files" not in said:
        return {}
    return {"train": [path / part["filename"] for part in said["_data_files"]]}


def _repository(path: Path, formats: Sequence[str]) -> Splits:
    """Split → files of the only or the default configuration. ConfigError if that is in doubt."""
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError(f"{path} is a directory, and `datasets` reads those: pip install {PIN}, or give a file in it")
    import datasets

    datasets.disable_progress_bars()
    folder = path.resolve()
    if has_magic(str(folder)):
        raise ConfigError(f"{folder} has one of * ? [ in its name, a pattern to `datasets`: rename it, or give a file")
    if not any(file.is_file() for suffix in formats for file in folder.rglob(f"*{suffix}")):
        raise ConfigError(
            f"{path} has no {' or '.join(formats)} files and was not saved by datasets: give a file in it"
        )
    card = _card(folder)
    names = datasets.get_dataset_config_names(str(folder))
    name = datasets.get_dataset_default_config_name(str(folder))
    if name is None:
        raise ConfigError(
            f"{path} has several configurations, {', '.join(map(repr, names))}, which may hold the same problems, and "
            "its README.md names no default: give the path of one's files"
        )
    with tempfile.TemporaryDirectory() as cache:  # for its lock files
        found = datasets.load_dataset_builder(str(folder), name=name, cache_dir=cache).config.data_files
    splits = {str(split): [Path(file) for file in dict.fromkeys(files)] for split, files in found.items() if files}
    described = card.get(name, {})
    _refuse_doubts(path, splits, formats)
    if "data_files" not in described:  # else the card's author said which file is what
        _refuse_guesses(path, folder / str(described.get("data_dir") or ""), splits)
    return splits


def _card(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Configuration → its description in README.md or .huggingface.yaml. ConfigError if it has files of the network."""
    from huggingface_hub import DatasetCard

    readme, beside = folder / "README.md", folder / ".huggingface.yaml"
    head = DatasetCard.load(readme).data.to_dict() if readme.is_file() else {}
    if beside.is_file():
        head |= yaml.safe_load(beside.read_text(encoding="utf-8")) or {}
    configs = {config.get("config_name"): config for config in head.get("configs") or []}
    for name, config in configs.items():
        for text in _texts([config.get("data_files"), config.get("data_dir")]):
            if "://" in text:
                raise ConfigError(
                    f"{folder}: {name!r} of its README.md has {text!r}, and nothing is taken from the network: "
                    "download it, or give the path of a file"
                )
    return configs


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _refuse_doubts(path: Path, splits: Splits, formats: Sequence[str]) -> None:
    """ConfigError if a file cannot be read here, or belongs to two splits."""
    home: dict[Path, str] = {}
    for split, files in splits.items():
        for file in files:
            if file.suffix not in formats:
                raise ConfigError(
                    f"{path}: {file} is to be read as rows of the split {split!r}, and is not one of "
                    f"{', '.join(formats)}: convert it, take it away, or give the path of one file"
                )
            if home.setdefault(file, split) != split:
                raise ConfigError(
                    f"{path}: {file} belongs to the splits {home[file]!r} and {split!r}: rename it, or give its path"
                )


def _refuse_guesses(path: Path, root: Path, splits: Splits) -> None:
    """ConfigError if names alone say which files are what, and they say two things."""
    folders: dict[str, Path] = {}
    for split, files in splits.items():
        for file in files:
            parts = file.relative_to(root).parts if file.is_relative_to(root) else (file.name,)
            told = {SPLITS[word] for part in parts for word in _words(part) if word in SPLITS}
            other = told - {SPLITS.get(word, word) for word in _words(split)}
            if other:
                raise ConfigError(
                    f"{path}: {file} counts to the split {split!r}, and its name says {sorted(other)[0]!r}: rename it "
                    "(in lower case), or give the path of one file"
                )
            plain = ("-".join(word for word in re.split("[-._ ]+", part) if word not in SPLITS) for part in parts[:-1])
            folders.setdefault("/".join(name for name in plain if name and name not in NO_CONFIGURATION), file.parent)
    if len(folders) > 1:
        names = ", ".join(repr(name or ".") for name in folders)
        one = next(folder for name, folder in folders.items() if name)
        raise ConfigError(
            f"{path} has several configurations, {names}, which may hold the same problems: give the path of one, such "
            f"as {str(one)!r}"
        )


def _words(name: str) -> list[str]:
    return re.split("[-._ 0-9]+", name.lower())


def _choose(path: Path, splits: Sequence[str], split: str | None) -> str:
    """The split that is asked for, by any of its names; else the only one, or `train`."""
    if split is None and len(splits) == 1:
        return splits[0]
    wanted = split or "train"
    if wanted in splits:
        return wanted
    for name in splits:  # dev, say, where the files are called validation
        if SPLITS.get(name.lower(), name) == SPLITS.get(wanted.lower(), wanted):
            return name
    raise ConfigError(
        f"data.split = {split!r}: {path} has {', '.join(map(repr, sorted(splits)))}; set data.split to one"
    )
