"""The rows of a prompt file, one at a time: JSON lines, Parquet, or a dataset directory of the Hugging Face libraries.

    read_rows(path) ─▶ (file, number of the row in it, the row or what is wrong with it)

Nothing is taken from the network. dataset_directory.py says which files of a directory are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prune_opd.data.dataset_directory import dataset_files
from prune_opd.errors import ConfigError

FORMATS = (".jsonl", ".parquet")

Row = dict[str, Any]
Numbered = tuple[Path, int, Row | ConfigError]


def read_rows(path: Path, split: str | None = None) -> Iterator[Numbered]:
    """Every row with its file and number, from 1 (in a .jsonl file the line's number; blank lines are left out).

    In place of a row that cannot be read comes the error that says why.

    Raises:
        ConfigError: the path cannot be read, has another format, or has several splits of which `split` names none.
    """
    for file in prompt_files(path, split):
        try:
            match file.suffix:
                case ".jsonl":
                    yield from _json_lines(file)
                case ".parquet":
                    yield from _parquet(file)
                case _:
                    yield from _arrow(file)
        except OSError as error:  # pyarrow's errors of a broken file are among them
            raise ConfigError(f"{file} cannot be read: {error.strerror or ' '.join(str(error).split())}") from error


def prompt_files(path: Path, split: str | None = None) -> list[Path]:
    """The files that `path` stands for, in the order of their names.

    Raises:
        ConfigError: see `read_rows`.
    """
    if not path.exists():
        raise ConfigError(f"{path}: there is no such file or directory (looked for {path.absolute()})")
    if path.is_dir():
        return dataset_files(path, split, FORMATS)
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path} is not one of {', '.join(FORMATS)}: convert it to one JSON object a line")
    return [path]


def _json_lines(path: Path) -> Iterator[Numbered]:
    with path.open("rb") as file:  # in binary, so that only \n ends a line and a wrong encoding has a line number
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield path, number, _json_row(line)


def _json_row(line: bytes) -> Row | ConfigError:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return ConfigError(f"not valid JSON ({error})")
    if not isinstance(row, dict):
        text = repr(row)
        return ConfigError(f'a row is an object such as {{"prompt": "..."}}, not {text[:57]}')
    return row


def _parquet(path: Path) -> Iterator[Numbered]:
    import pyarrow.parquet

    try:
        yield from _numbered(path, pyarrow.parquet.ParquetFile(path).iter_batches())
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{path} is not a Parquet file ({' '.join(str(error).split())})") from error


def _arrow(path: Path) -> Iterator[Numbered]:
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(path)) as file:
            yield from _numbered(path, pyarrow.ipc.open_stream(file))
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{path} is not an Arrow file ({' '.join(str(error).split())})") from error


def _numbered(path: Path, batches: Any) -> Iterator[Numbered]:
    number = 0
    for batch in batches:
        short = [field.name for field in batch.schema if str(field.type) in ("float", "halffloat")]
        for row in batch.to_pylist():
            number += 1
            for name in short:
                row[name] = _shortest(row[name])
            yield path, number, row


def _shortest(value: float | None) -> float | None:
    """A float32 as it was written: 2.5e16, not the 24999999607668736 that is next to it as a double."""
    import numpy

    return None if value is None else float(str(numpy.float32(value)))
