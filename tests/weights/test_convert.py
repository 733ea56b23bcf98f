"""Pickled weights: refused, converted when it is asked for, and never run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prune_opd.errors import ConfigError, UserError
from prune_opd.weights.convert import convert_pickle
from prune_opd.weights.load import SafetensorsDirectory


class Program:
    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.touched),)


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}, folder / "pytorch_model.bin")
    return folder


def test_pickled_weights_are_not_loaded(pickled: Path) -> None:
    with pytest.raises(ConfigError, match="pickled weights are not read: prune-opd convert"):
        SafetensorsDirectory(pickled)


def test_converting_takes_the_flag(pickled: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"can be a program: .* give --allow-pickle"):
        convert_pickle(pickled, tmp_path / "out", allow_pickle=False)
    assert not (tmp_path / "out").exists()


def test_converted_weights_are_the_same(pickled: Path, tmp_path: Path) -> None:
    convert_pickle(pickled, tmp_path / "out", allow_pickle=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["a"], torch.arange(6.0).view(2, 3)) and torch.equal(found["b"], torch.ones(2))
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_program_among_the_weights_is_not_run_even_with_the_flag(pickled: Path, tmp_path: Path) -> None:
    torch.save({"a": Program(tmp_path / "ran")}, pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="does not hold weights alone"):
        convert_pickle(pickled, tmp_path / "out", allow_pickle=True)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_a_directory_without_pickles_has_nothing_to_convert(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no pytorch_model\.bin in it"):
        convert_pickle(tmp_path, tmp_path / "out", allow_pickle=True)
