"""Checks of the machine and the files: versions, driver, space, prompts; and what both models must have in common."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prune_opd.check import run as check
from prune_opd.check.machine import (
    CPU_PINS,
    GPU_OPTIONAL_PINS,
    GPU_PINS,
    checkpoint_bytes,
    compiler_problems,
    driver_problems,
    prompt_problems,
    space_problems,
    version_problems,
)
from prune_opd.check.run import check_everything, check_train
from prune_opd.config import RolloutConfig, TrainConfig
from tests.fake_models import tokenizer, train_config, with_weights, write_model

REQUIREMENTS = Path(__file__).parents[2] / "requirements"
DOCKER = REQUIREMENTS.parent / "docker"


@pytest.fixture
def pair(tmp_path: Path) -> TrainConfig:
    return train_config(write_model(tmp_path / "student"), write_model(tmp_path / "teacher"))


def ends(directory: str, file: str, ids: object) -> None:
    path = Path(directory) / file
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**settings, "eos_token_id": ids}))


# ---------------------------------------------------------------------------------------------------- shared tokens


def test_models_that_end_differently_are_refused(pair: TrainConfig) -> None:
    ends(pair.student, "config.json", 1)
    ends(pair.teacher, "config.json", 0)
    (line,) = check_train(pair, 2, None, "auto")
    assert "ends with the ids [0] and the student with [1]" in line and "generation_config.json" in line


def test_one_end_in_common_is_enough_as_of_a_base_and_a_chat_model(pair: TrainConfig) -> None:
    ends(pair.student, "config.json", 1)
    ends(pair.teacher, "config.json", 0)
    ends(pair.teacher, "generation_config.json", [0, 1])
    assert check_train(pair, 2, None, "auto") == []


def test_a_token_without_a_row_is_refused(pair: TrainConfig, tmp_path: Path) -> None:
    larger = tokenizer() | {
        "added_tokens": [*tokenizer()["added_tokens"], {"id": 40, "content": "<x>", "special": False}]
    }
    teacher, student = write_model(tmp_path / "t2", larger), write_model(tmp_path / "s2", larger, vocab_size=41)
    (line,) = check_train(train_config(student, teacher), 2, None, "auto")
    assert "its tokenizer has the id 40 and its config.json vocab_size = 32" in line


def test_a_teacher_with_fewer_rows_than_the_student_has_ids_is_refused(tmp_path: Path) -> None:
    student, teacher = write_model(tmp_path / "student", vocab_size=300), write_model(tmp_path / "teacher")
    for ranks in (1, 2):  # at every layout: what pads the vocabulary over TP ranks is no row of an id
        (line,) = check_train(train_config(student, teacher), ranks, None, "auto")
        assert "it has rows for 32 ids, and the student may sample 300: choose a teacher" in line


ADDED = {"id": 32, "content": "<think>", "special": False}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"32": ADDED}}),
        ("tokenizer_config.json", {"additional_special_tokens": ["<bos>", "<think>"]}),
        ("tokenizer_config.json", {"extra_special_tokens": [ADDED]}),
        ("tokenizer_config.json", {"extra_special_tokens": {"think_token": "<think>"}}),
        ("tokenizer_config.json", {"pad_token": "<think>"}),
        ("added_tokens.json", {"<think>": 32}),
    ],
)
def test_a_token_that_only_the_settings_of_one_tokenizer_name_is_refused(
    file: str, content: dict[str, Any], tmp_path: Path
) -> None:
    models = [write_model(tmp_path / name, vocab_size=33) for name in ("student", "teacher")]
    (models[0] / file).write_text(json.dumps(content))
    (line,) = check_train(train_config(*models), 2, None, "auto")
    assert "another tokenizer than the student: id 32 is '<think>' for the student and unused for the teacher" in line
    (models[1] / file).write_text(json.dumps(content))
    assert check_train(train_config(*models), 2, None, "auto") == []


# ---------------------------------------------------------------------------------------------------- packages


def test_this_environment_is_the_pinned_one() -> None:
    assert version_problems(CPU_PINS, {}) == []


def test_the_pins_are_those_of_the_requirements() -> None:
    text = (REQUIREMENTS / "cpu.txt").read_text() + (REQUIREMENTS / "cpu-nodeps.txt").read_text()
    for package, version in CPU_PINS.items():
        assert f"{package}=={version}" in text
    assert all(CPU_PINS[package] == GPU_PINS[package] for package in CPU_PINS.keys() & GPU_PINS.keys())
    image = [line for name in ("pins.h100.txt", "pins.h100-build.txt") for line in (DOCKER / name).read_text().split()]
    assert {f"{package}=={version}" for package, version in (GPU_PINS | GPU_OPTIONAL_PINS).items()} <= set(image)


def test_other_and_missing_versions_are_named_and_optional_packages_may_be_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed = {"torch": "2.12.0+cu130", "vllm": "0.32.0+cu130", "flash-attn": "2.8.3.post1"}

    def version(package: str) -> str:
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    pins = {"torch": "2.13.0", "vllm": "0.32.0", "transformers": "5.19.0"}
    assert version_problems(pins, {"flash-attn": "2.8.3", "transformer-engine": "2.11.0"}) == [
        "torch is 2.12.0 and was tested with 2.13.0 only: install torch==2.13.0",
        "transformers is not installed: install transformers==5.19.0",
        "flash-attn is 2.8.3.post1 and was tested with 2.8.3 only: install flash-attn==2.8.3",
    ]


@pytest.mark.parametrize(("driver", "old"), [("570.86.10", True), ("580.65.06", False), ("595.1", False)])
def test_an_old_driver_is_named(tmp_path: Path, driver: str, old: bool) -> None:
    version = tmp_path / "version"
    version.write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Tue Jan 1 00:00:00 UTC 2026\n")
    found = driver_problems((13, 0), version)
    assert len(found) == old
    if old:
        assert "driver is 570 and torch was built for CUDA 13, which needs 580" in found[0]
    assert driver_problems((13, 0), tmp_path / "none") == []


def test_an_engine_to_be_compiled_needs_a_compiler_headers_and_a_cache_on_the_cpu(
    pair: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = RolloutConfig(enforce_eager=False)
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "new" / "cache"))
    (line,) = compiler_problems(compiled, gpu=False)
    assert "rollout.enforce_eager = false" in line and "no-such-compiler" in line and "Python.h" in line
    monkeypatch.setattr(check, "has_gpu", lambda: False)
    assert line in check_train(replace(pair, rollout=compiled), 2, None, "auto")
    for other in (RolloutConfig(), RolloutConfig(enforce_eager=True)):
        assert compiler_problems(other, gpu=False) == []
    assert compiler_problems(compiled, gpu=True) == [], "what a GPU needs is in its image"
    (tmp_path / "Python.h").touch()
    (line,) = compiler_problems(compiled, gpu=False)
    assert "Python.h" not in line
    monkeypatch.setenv("CXX", sys.executable)
    assert compiler_problems(compiled, gpu=False) == []
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "Python.h" / "cache"))
    forbidden, read_only = compiler_problems(compiled, gpu=False)
    assert "TORCH_COMPILE_DISABLE=1" in forbidden
    assert "VLLM_CACHE_ROOT" in read_only and "is a file; choose another path" in read_only


# ---------------------------------------------------------------------------------------------------- files


def test_a_full_disk_is_named_with_the_bytes_that_are_needed(
    pair: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert space_problems(pair, tmp_path / "run") == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=checkpoint_bytes(pair) - 1, total=1))
    (line,) = space_problems(pair, tmp_path / "run")
    assert "GB are free and checkpoints take about" in line and "checkpoint.keep = 2" in line


def test_every_prompt_is_looked_at_and_the_first_bad_line_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = ['{"prompt": "a", "answer": "1"}', "", '{"messages": [{"role": "user", "content": "b"}]}']
    path.write_text("\n".join(rows) + "\n")
    assert prompt_problems("data.source", str(path), None) == []
    (line,) = prompt_problems("evaluation.sources", str(path), None, answers=True)
    assert f'{path}:3: there is no "answer"; repair' in line
    path.write_text("\n".join([*rows, "{", "[]", '{"question": 1}']) + "\n")
    (line,) = prompt_problems("data.source", str(path), None)
    assert f"{path}:4: not valid JSON" in line and "(and 2 more rows)" in line
    path.write_text("\n")
    assert "has no prompts" in prompt_problems("data.source", str(path), None)[0]


def test_the_whole_preflight_passes_for_a_good_run(pair: TrainConfig, tmp_path: Path) -> None:
    for model in (pair.student, pair.teacher):
        with_weights(Path(model))
    assert check_everything(pair, 2, tmp_path / "run", "auto") == []
