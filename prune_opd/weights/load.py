"""Hugging Face safetensors into a megatron-core model: each rank reads its own part of each tensor from the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from prune_opd.errors import ConfigError
from prune_opd.weights.mapping import Entry, entries, read_shard

if TYPE_CHECKING:
    from prune_opd.megatron.model import HiddenStatesGPT


class SafetensorsDirectory:
    """Slices of named tensors from one `model.safetensors` or from a sharded set with its index."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        index = self.directory / "model.safetensors.index.json"
        single = self.directory / "model.safetensors"
        if index.exists():
            self.file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif single.exists():
            with safe_open(single, "pt") as file:
                self.file_of = dict.fromkeys(file.keys(), single.name)
        else:
            raise ConfigError(
                f"{self.directory}: no model.safetensors and no index of one (pickled weights are not read)"
            )
        self._open: dict[str, safe_open] = {}

    def _slice(self, name: str) -> object:
        if name not in self.file_of:
            raise ConfigError(f"{self.directory}: no tensor {name!r}; is config.json from another model?")
        file = self.file_of[name]
        if file not in self._open:
            self._open[file] = safe_open(self.directory / file, "pt")
        return self._open[file].get_slice(name)

    def shape(self, name: str) -> list[int]:
        return self._slice(name).get_shape()  # type: ignore[attr-defined]

    def rows(self, name: str, first: int, end: int) -> Tensor:
        return self._slice(name)[first:end]  # type: ignore[index]

    def columns(self, name: str, first: int, end: int) -> Tensor:
        return self._slice(name)[:, first:end]  # type: ignore[index]


@torch.no_grad()
def load_hf_weights(model: HiddenStatesGPT, directory: str | Path) -> None:
    """Fill every parameter of this rank. Raises `ConfigError` for a missing tensor or a shape that does not fit."""
    files = SafetensorsDirectory(directory)
    tp = model.pg_collection.tp
    parameters = dict(model.named_parameters())
    for entry in entries(model.spec):
        parameter = parameters.pop(entry.megatron)
        shard = read_shard(
            entry, model.spec, tp.rank(), tp.size(), files.rows, files.columns, _cut_length(entry, files)
        )
        if shard.shape != parameter.shape:
            raise ConfigError(
                f"{files.directory}: {', '.join(entry.hf)} gives shape {tuple(shard.shape)}, "
                f"but config.json asks for {tuple(parameter.shape)}"
            )
        parameter.copy_(shard)
    if parameters:
        raise ConfigError(f"{files.directory}: no weight is mapped to {', '.join(parameters)}")


def _cut_length(entry: Entry, files: SafetensorsDirectory) -> int:
    return files.shape(entry.hf[0])[1 if entry.cut == "columns" else 0]
