"""Whether a model's weight files are whole: every file that the index names, every tensor that config.json asks for.

Only the headers of the files are read, so a model of any size takes moments; and the output matrices of a model that
has two where its config.json says one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from prune_opd.errors import ConfigError
from prune_opd.model_spec import ModelSpec
from prune_opd.weights.mapping import EMBEDDING, HEAD, entries, missing

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1}
POINTER = b"version https://git-lfs"


def weight_problems(role: str, directory: Path, settings: dict[str, Any]) -> list[str]:
    """The first problem with the weights of a Hugging Face directory, as a list of one line; none: an empty list.

    role: the setting that names the model. settings: of its config.json.
    """
    try:
        shapes, spec = _tensors(directory), ModelSpec.of(settings, str(directory))
        for entry in entries(spec):
            for name, wanted in zip(entry.hf, entry.shapes, strict=True):
                if name not in shapes:
                    raise ConfigError(missing(name, shapes))
                if shapes[name] != tuple(wanted):
                    raise ConfigError(
                        f"tensor {name!r} has shape {list(shapes[name])}, but config.json asks for {list(wanted)}"
                    )
        if spec.tied and {HEAD, EMBEDDING} <= shapes.keys():
            from prune_opd.weights.load import SafetensorsDirectory, two_heads  # imports torch

            if problem := two_heads(SafetensorsDirectory(directory), spec):
                raise ConfigError(problem)
    except ConfigError as problem:
        return [f"{role} = {str(directory)!r}: {problem}"]
    return []


def _tensors(directory: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the index, or the one file, has. ConfigError if a file is not whole."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        try:
            file_of = {tensor: str(Path(file)) for tensor, file in json.loads(index.read_bytes())["weight_map"].items()}
        except (AttributeError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{index.name} cannot be read ({error!r}): copy the model again") from error
        headers = {name: header(directory / name) for name in sorted(set(file_of.values()))}
        for tensor, file in file_of.items():
            if tensor not in headers[file]:
                raise ConfigError(f"{index.name} has {tensor!r} in {file}, which lacks it: copy the model again")
        return {tensor: headers[file][tensor] for tensor, file in file_of.items()}
    if single.is_file():
        return header(single)
    raise ConfigError("no model.safetensors and no index of one (pickled weights are not read: prune-opd convert)")


def header(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor → shape, of a safetensors file's header. ConfigError if the file is missing, cut, or a Git LFS pointer."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            if POINTER.startswith(first) and first:
                raise ConfigError(f"{path.name} is a Git LFS pointer, no weights: git lfs pull, or download the model")
            length = int.from_bytes(first, "little")
            described = json.loads(file.read(length)) if len(first) == 8 and length <= size - 8 else None
    except FileNotFoundError as error:
        raise ConfigError(f"{path.name} is missing: copy the model again") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path.name} cannot be read ({error}): copy the model again") from error
    if not isinstance(described, dict):
        raise ConfigError(f"{path.name} has {size} bytes, fewer than its header: copy the model again")
    try:
        shapes = _shapes(path.name, described, size - 8 - length)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ConfigError(f"{path.name} has a header that cannot be read ({error!r}): copy the model again") from error
    from safetensors import SafetensorError, safe_open  # not in the environments that build the docs and submit jobs

    try:
        safe_open(path, "np")  # what reads it later finds more: gaps, bytes behind the last tensor. No torch
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path.name} cannot be read ({error}): copy the model again") from error
    return shapes


def _shapes(name: str, described: dict[str, Any], size: int) -> dict[str, tuple[int, ...]]:
    """Tensor → shape, of the entries of a header. ConfigError if they are not of a file with `size` bytes behind it."""
    tensors = {tensor: entry for tensor, entry in described.items() if tensor != "__metadata__"}
    end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if size < end:
        raise ConfigError(f"{name} has {size} bytes behind its header where {end} belong: copy the model again")
    for tensor, entry in tensors.items():
        begin, stop = entry["data_offsets"]
        if entry["dtype"] in BYTES and stop - begin != math.prod(entry["shape"]) * BYTES[entry["dtype"]]:
            raise ConfigError(f"{name}: tensor {tensor!r} has not the bytes of its shape: copy the model again")
    return {tensor: tuple(entry["shape"]) for tensor, entry in tensors.items()}
