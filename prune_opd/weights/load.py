"""Hugging Face safetensors into a megatron-core model: each rank reads its own part of each tensor from the files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import Parameter

from prune_opd.errors import ConfigError
from prune_opd.weights.mapping import Entry, ModelChunk, entries, local_parameters, merge_shards, read_shard

if TYPE_CHECKING:
    from prune_opd.model_spec import ModelSpec


class SafetensorsDirectory:
    """Slices of named tensors from one `model.safetensors` or from a sharded set with its index."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._open: dict[str, safe_open] = {}
        index = self.directory / "model.safetensors.index.json"
        single = self.directory / "model.safetensors"
        if index.exists():
            self.file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif single.exists():
            self.file_of = dict.fromkeys(self._file(single.name).keys(), single.name)
        else:
            raise ConfigError(
                f"{self.directory}: no model.safetensors and no index of one"
                " (pickled weights are not read: prune-opd convert)"
            )

    def _file(self, name: str) -> safe_open:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.directory / name, "pt")
            except (OSError, SafetensorError) as reason:
                raise ConfigError(f"{self.directory / name} cannot be read ({reason}): copy the model again") from None
        return self._open[name]

    def _slice(self, name: str) -> object:
        if name not in self.file_of:
            raise ConfigError(f"{self.directory}: no tensor {name!r}; is config.json from another model?")
        return self._file(self.file_of[name]).get_slice(name)

    def shape(self, name: str) -> list[int]:
        return self._slice(name).get_shape()  # type: ignore[attr-defined]

    def rows(self, name: str, first: int, end: int) -> Tensor:
        return self._slice(name)[first:end]  # type: ignore[index]

    def columns(self, name: str, first: int, end: int) -> Tensor:
        return self._slice(name)[:, first:end]  # type: ignore[index]


@torch.no_grad()
def load_hf_weights(chunks: Sequence[ModelChunk], directory: str | Path) -> None:
    """Fill every parameter of this rank. Raises `ConfigError` for a missing tensor or a shape that does not fit."""
    files = SafetensorsDirectory(directory)
    spec, groups = chunks[0].spec, chunks[0].pg_collection
    parameters = local_parameters(chunks)
    for entry in entries(spec):
        parameter = parameters.pop(entry.megatron, None)
        if parameter is None:
            continue  # of another stage, or an expert of another rank
        over = groups.tp if entry.expert is None else groups.expt_tp
        _check_shapes(entry, spec, [parameter.to("meta")] * over.size(), files)
        parameter.copy_(_read(entry, spec, files, over.rank(), over.size()))
        _mark_cut(parameter, entry)
    if parameters:
        raise ConfigError(f"{files.directory}: no weight is mapped to {', '.join(parameters)}")


def read_head(directory: str | Path, spec: ModelSpec, tp_rank: int, tp_size: int) -> Tensor:
    """One TP rank's rows of a model's output matrix [padded vocabulary / tp_size, H], in the dtype of the files."""
    name = "embedding.word_embeddings.weight" if spec.tied else "output_layer.weight"
    (entry,) = (entry for entry in entries(spec) if entry.megatron == name)
    return _read(entry, spec, SafetensorsDirectory(directory), tp_rank, tp_size)


def _read(entry: Entry, spec: ModelSpec, files: SafetensorsDirectory, rank: int, size: int) -> Tensor:
    cut_length = files.shape(entry.hf[0])[1 if entry.cut == "columns" else 0]
    return read_shard(entry, spec, rank, size, files.rows, files.columns, cut_length)


def _check_shapes(entry: Entry, spec: ModelSpec, shards: list[Tensor], files: SafetensorsDirectory) -> None:
    """Before a slice is taken: one of a tensor that is larger than config.json says would be silently wrong."""
    for name, whole in merge_shards(entry, spec, shards):
        if files.shape(name) != list(whole.shape):
            raise ConfigError(
                f"{files.directory}: tensor {name!r} has shape {files.shape(name)}, "
                f"but config.json asks for {list(whole.shape)}"
            )


def _mark_cut(parameter: Parameter, entry: Entry) -> None:
    """Say along which dimension a weight is cut, as megatron-core does where it initialises weights itself.

    Without it megatron takes the shards of all ranks but the first for duplicates: the gradient norm leaves them out,
    and so every clipped step at TP > 1 would be too long.
    """
    if entry.cut != "whole":
        attributes: Any = parameter
        attributes.tensor_model_parallel = True
        attributes.partition_dim = 1 if entry.cut == "columns" else 0
        attributes.partition_stride = 1
