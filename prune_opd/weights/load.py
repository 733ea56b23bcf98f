"""Hugging Face safetensors into a megatron-core model: each rank reads its own part of each tensor from the files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import Parameter

from prune_opd.errors import ConfigError
from prune_opd.model_spec import ModelSpec
from prune_opd.process import tell
from prune_opd.weights.mapping import EMBEDDING, HEAD, Entry, ModelChunk, entries, local_parameters, missing

ROWS_AT_ONCE = 8192


class SafetensorsDirectory:
    """Slices of named tensors from one `model.safetensors` or from a sharded set with its index."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._open: dict[str, safe_open] = {}
        self.file_of: dict[str, str] = {}
        index = self.directory / "model.safetensors.index.json"
        single = self.directory / "model.safetensors"
        if index.exists():
            self.file_of = json.loads(index.read_text())["weight_map"]
        elif single.exists():
            self.file_of = dict.fromkeys(self._file(single.name).keys(), single.name)
        else:
            raise ConfigError(
                f"{self.directory}: no model.safetensors and no index of one"
                " (pickled weights are not read: prune-opd convert)"
            )

    def _file(self, name: str) -> safe_open:
        if name not in self._open:
            tell(f"reading {self.directory}, file {len(self._open) + 1} of {len(set(self.file_of.values()) | {name})}")
            try:
                self._open[name] = safe_open(self.directory / name, "pt")
            except (OSError, SafetensorError) as reason:
                raise ConfigError(f"{self.directory / name} cannot be read ({reason}): copy the model again") from None
        return self._open[name]

    def _slice(self, name: str) -> object:
        if name not in self.file_of:
            raise ConfigError(f"{self.directory}: {missing(name, self.file_of)}")
        return self._file(self.file_of[name]).get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())  # type: ignore[attr-defined]

    def read(self, name: str, dim: int, begin: int, end: int) -> Tensor:
        """Rows (dim 0) or columns (dim 1) of a tensor, and nothing else of it."""
        tensor: Any = self._slice(name)
        return tensor[:, begin:end] if dim else tensor[begin:end]


def two_heads(files: SafetensorsDirectory, spec: ModelSpec) -> str | None:
    """What is wrong where config.json ties the output head to the embedding and the files have another head.

    transformers leaves such a model untied. A head that is a copy of the embedding is fine.
    """
    if not spec.tied or not {HEAD, EMBEDDING} <= files.file_of.keys():
        return None
    rows = files.shape(HEAD)[0]
    spans = [(first, min(first + ROWS_AT_ONCE, rows)) for first in range(0, rows, ROWS_AT_ONCE)]
    alike = files.shape(HEAD) == files.shape(EMBEDDING)
    if alike and all(torch.equal(files.read(HEAD, 0, *s), files.read(EMBEDDING, 0, *s)) for s in spans):
        return None
    return (
        f"{HEAD!r} is not the embedding, and config.json says tie_word_embeddings = true: set it to false, or remove "
        "that tensor if the head is the embedding after all"
    )


@torch.no_grad()
def load_hf_weights(chunks: Sequence[ModelChunk], directory: str | Path) -> None:
    """Fill every parameter of this rank. Raises `ConfigError` for a missing tensor or a shape that does not fit."""
    files = SafetensorsDirectory(directory)
    spec, groups = chunks[0].spec, chunks[0].pg_collection
    parameters = local_parameters(chunks)
    if problem := two_heads(files, spec):
        raise ConfigError(f"{files.directory}: {problem}")
    for entry in entries(spec):
        parameter = parameters.pop(entry.megatron, None)
        if parameter is None:
            continue  # of another stage, or an expert of another rank
        _check_shapes(entry, files)
        shard = read_shard(entry, files, *entry.shard_of(groups))
        assert shard.shape == parameter.shape, entry.megatron
        parameter.copy_(shard)
        _mark_cut(parameter, entry)
    if parameters:
        raise ConfigError(f"{files.directory}: no weight is mapped to {', '.join(parameters)}")


def read_head(directory: str | Path, spec: ModelSpec, tp_rank: int, tp_size: int) -> Tensor:
    """One TP rank's rows of a model's output matrix [padded vocabulary / tp_size, H], in the dtype of the files."""
    name = "embedding.word_embeddings.weight" if spec.tied else "output_layer.weight"
    (entry,) = (entry for entry in entries(spec) if entry.megatron == name)
    return read_shard(entry, SafetensorsDirectory(directory), tp_rank, tp_size)


def read_shard(entry: Entry, files: SafetensorsDirectory, index: int, count: int) -> Tensor:
    """A shard of a megatron parameter in the dtype of the files, reading only its part of each tensor."""
    cut, shapes = entry.cut, entry.shapes
    spans = zip(entry.hf, cut.spans(shapes, index, count), strict=True)
    read = [files.read(name, cut.dim, begin, end) for name, (begin, end) in spans]
    shard = read[0].new_zeros(cut.shape(shapes, count))
    for part, piece in zip(cut.parts(shard, shapes, index, count), read, strict=True):
        part.copy_(piece.view(part.shape))
    return shard


def _check_shapes(entry: Entry, files: SafetensorsDirectory) -> None:
    """Before a slice is taken: one of a tensor that is larger than config.json says would be silently wrong."""
    for name, shape in zip(entry.hf, entry.shapes, strict=True):
        if files.shape(name) != shape:
            raise ConfigError(
                f"{files.directory}: tensor {name!r} has shape {list(files.shape(name))}, "
                f"but config.json asks for {list(shape)}"
            )


def _mark_cut(parameter: Parameter, entry: Entry) -> None:
    """Say along which dimension a weight is cut, as megatron-core does where it initialises weights itself.

    Without it megatron takes the shards of all ranks but the first for duplicates: the gradient norm leaves them out,
    and so every clipped step at TP > 1 would be too long.
    """
    if entry.cut.divided:
        attributes: Any = parameter
        attributes.tensor_model_parallel = True
        attributes.partition_dim = entry.cut.dim
        attributes.partition_stride = 1
