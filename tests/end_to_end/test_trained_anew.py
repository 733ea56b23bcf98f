"""Tiny models that were trained anew take the shipped ones' place when the setting says so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from prune_opd.config import TrainConfig
from prune_opd.config.recipe import load_recipe
from tests.end_to_end.runs import forked


def test_a_model_trained_anew_is_found_through_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNE_OPD_CACHE", str(tmp_path))
    monkeypatch.setenv("PRUNE_OPD_TINY_MODELS", "trained")
    pair = load_recipe("tiny_compatible")
    assert isinstance(pair, TrainConfig)
    with pytest.raises(AssertionError, match=r"student = .*there is no such directory.*`make tiny-models`"):
        forked("check", "tiny_compatible")
    few = ("stages.0.steps=1", "stages.0.batch=2", "stages.1.steps=1", "stages.1.batch=2", "parallel.nproc=1")
    forked("sft", "tiny_base", f"output={pair.student}", *few)
    shutil.copytree(pair.student, pair.teacher)
    assert forked("check", "tiny_compatible") == "ok\n"
