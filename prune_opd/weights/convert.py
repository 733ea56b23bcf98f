"""Pickled weights as safetensors: the one place where weights are unpickled, and only when it is asked for."""

from __future__ import annotations

import json
import pickle
from functools import partial
from pathlib import Path

import torch

from prune_opd.errors import UserError
from prune_opd.process import progress
from prune_opd.weights.files import HfDirectoryWriter

PICKLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FILE_BYTES = 5 * 10**9


def convert_pickle(model_dir: Path, out_dir: Path, allow_pickle: bool) -> None:
    """Write the Hugging Face directory `model_dir`, whose weights are pickled, to `out_dir` with safetensors.

    Read with `weights_only`: tensors and nothing that runs. Raises `UserError` without `allow_pickle`, when there are
    no pickled weights, and when a file holds anything else.
    """
    index = model_dir / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    elif (model_dir / PICKLE).is_file():
        names = [PICKLE]
    else:
        raise UserError(f"MODEL_DIR = {str(model_dir)!r}: there is no {PICKLE} in it, so there is nothing to convert")
    if not allow_pickle:
        raise UserError(
            f"{model_dir / names[0]} is a pickle, which can be a program: if you trust where it is from, "
            "give --allow-pickle"
        )
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"OUT_DIR = {str(out_dir)!r} is there already: choose a new directory")
    writer = HfDirectoryWriter(out_dir, model_dir, FILE_BYTES)
    for number, name in enumerate(names, 1):
        try:
            tensors = torch.load(model_dir / name, map_location="cpu", weights_only=True)
            for key, tensor in tensors.items():
                writer.add(key, tensor)
                progress(partial("{}, file {} of {}".format, name, number, len(names)))
        except (pickle.UnpicklingError, RuntimeError, AttributeError, EOFError) as error:
            brief = str(error).partition("\n")[0]
            raise UserError(f"{model_dir / name} does not hold weights alone ({brief}): it is not read") from error
    writer.finish()
