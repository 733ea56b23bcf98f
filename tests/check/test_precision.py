"""What check/precision.py refuses, on fake model directories; rollout/test_formats.py tries the arguments themselves.

Transformer Engine and a GPU are not here: the look-ups that find them are replaced, and tested on made-up packages.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from prune_opd.check import precision
from prune_opd.check import run as check
from prune_opd.check.precision import cuda_of_torch, transformer_engine_problem
from prune_opd.check.run import check_train
from prune_opd.config import Fp8Config, MemoryConfig, PrecisionConfig, RolloutConfig, TrainConfig
from prune_opd.config.overrides import apply_overrides
from prune_opd.errors import ConfigError
from prune_opd.megatron.precision import token_multiple
from tests.fake_models import train_config, write_model

BF16 = PrecisionConfig(params="bf16")


@pytest.fixture
def pair(tmp_path: Path) -> TrainConfig:
    config = train_config(write_model(tmp_path / "student"), write_model(tmp_path / "teacher"))
    return dataclasses.replace(config, precision=BF16)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a GPU, CUDA 13.0 and Transformer Engine, as far as the checks can see."""
    monkeypatch.setattr(check, "has_gpu", lambda: True)
    monkeypatch.setattr(precision, "transformer_engine_problem", lambda: None)
    monkeypatch.setattr(precision, "cuda_of_torch", lambda: (13, 0))
    return monkeypatch


def problems(config: TrainConfig, *overrides: str, nproc: int = 2) -> list[str]:
    return check_train(apply_overrides(config, list(overrides)), nproc, None, "auto")


def only(found: list[str]) -> str:
    assert len(found) == 1, found
    assert "\n" not in found[0]
    return found[0]


# ---------------------------------------------------------------------------------------------------- FP8 of the models


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
@pytest.mark.parametrize("form", ["e4m3", "hybrid"])
def test_every_format_and_recipe_passes_on_hopper(
    pair: TrainConfig, hopper: pytest.MonkeyPatch, role: str, recipe: str, form: str
) -> None:
    if (role, recipe) == ("teacher", "delayed"):
        return  # refused: see below
    part = f"precision.{role}_fp8"
    settings = (f"{part}.format={form}", f"{part}.recipe={recipe}", f"{part}.param=true")
    assert problems(pair, *settings, "parallel.distributed_optimizer=true") == []


def test_delayed_scaling_is_refused_for_the_teacher_whose_passes_make_no_gradients() -> None:
    with pytest.raises(ConfigError, match=r"precision\.teacher_fp8\.recipe = 'delayed' never gets a scale"):
        PrecisionConfig(teacher_fp8=Fp8Config("hybrid", "delayed"))
    PrecisionConfig(student_fp8=Fp8Config("hybrid", "delayed"), teacher_fp8=Fp8Config("hybrid", "tensorwise"))


@pytest.mark.parametrize(("ranks", "remedy"), [(4, "rollout.tensor_parallel=2, or "), (1, None), (2, None)])
def test_experts_in_blocks_are_refused_where_a_block_would_be_cut(ranks: int, remedy: str | None) -> None:
    """768 columns of an expert over 4 ranks are 192: vLLM would wait for the rest of a block for ever."""
    rollout = RolloutConfig(quantization="fp8_per_block", tensor_parallel=ranks)
    found = precision.expert_block_problems(rollout, {"moe_intermediate_size": 768})
    assert len(found) == (remedy is not None)
    if remedy:
        assert "moe_intermediate_size = 768 / rollout.tensor_parallel = 4" in found[0] and f"set {remedy}" in found[0]
    assert precision.expert_block_problems(rollout, {"hidden_size": 64}) == []
    per_tensor = dataclasses.replace(rollout, quantization="fp8_per_tensor")
    assert precision.expert_block_problems(per_tensor, {"moe_intermediate_size": 768}) == []


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_fp8_is_refused_without_a_gpu_for_the_model_that_asks(
    pair: TrainConfig, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "has_gpu", lambda: False)
    line = only(problems(pair, f"precision.{role}_fp8.format=hybrid"))
    assert line.startswith(f"precision.{role}_fp8.format = 'hybrid' needs a CUDA GPU")
    assert line.endswith(f"set precision.{role}_fp8.format=null")


def test_fp8_is_refused_without_transformer_engine(pair: TrainConfig, hopper: pytest.MonkeyPatch) -> None:
    hopper.undo()
    hopper.setattr(check, "has_gpu", lambda: True)
    line = only(problems(pair, "precision.student_fp8.format=e4m3"))
    assert "needs Transformer Engine, and it is not installed" in line


def test_blockwise_is_refused_below_cuda_12_9(pair: TrainConfig, hopper: pytest.MonkeyPatch) -> None:
    hopper.setattr(precision, "cuda_of_torch", lambda: (12, 8))
    fp8 = "precision.student_fp8.format=e4m3"
    line = only(problems(pair, fp8))
    assert "recipe = 'blockwise' needs CUDA 12.9 and this torch has 12.8" in line
    assert problems(pair, fp8, "precision.student_fp8.recipe=tensorwise") == []
    hopper.setattr(precision, "cuda_of_torch", lambda: (12, 9))
    assert problems(pair, fp8) == []


def test_mxfp8_is_refused_on_hopper() -> None:
    with pytest.raises(ConfigError, match=r"precision\.teacher_fp8\.recipe = 'mxfp8' needs a Blackwell GPU"):
        PrecisionConfig(teacher_fp8=Fp8Config(format="e4m3", recipe="mxfp8"))


@pytest.mark.parametrize("end", ["first_layers_bf16", "last_layers_bf16"])
def test_delayed_scaling_takes_no_layers_in_bf16(end: str) -> None:
    with pytest.raises(ConfigError, match=rf"precision\.student_fp8\.{end} = 1 does not go with recipe = delayed"):
        PrecisionConfig(student_fp8=Fp8Config("hybrid", "delayed", **{end: 1}))
    assert PrecisionConfig(student_fp8=Fp8Config("hybrid", "tensorwise", **{end: 1})).student_fp8.on


def test_more_bf16_layers_than_there_are_is_refused(pair: TrainConfig, hopper: pytest.MonkeyPatch) -> None:
    settings = ("precision.student_fp8.format=e4m3", "precision.student_fp8.last_layers_bf16=5")
    assert "last_layers_bf16 = 5 is above the 4 layers of the student: set at most 4" in only(problems(pair, *settings))


def test_fp8_does_not_go_with_fp32_parameters() -> None:
    with pytest.raises(ConfigError, match=r"precision\.params = 'fp32' does not go with .* set precision\.params=bf16"):
        PrecisionConfig(params="fp32", student_fp8=Fp8Config("hybrid"))


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ({"hidden_size": 72, "head_dim": 16}, "hidden_size = 72"),
        ({"intermediate_size": 80}, "intermediate_size / parallel.teacher_tensor 2 = 40"),
        ({"num_attention_heads": 6, "head_dim": 24}, "heads × head_dim / parallel.teacher_tensor 2 = 72"),
    ],
)
def test_matrices_that_fp8_cannot_multiply_are_refused_by_name(
    pair: TrainConfig, hopper: pytest.MonkeyPatch, tmp_path: Path, shape: dict[str, int], name: str
) -> None:
    other = dataclasses.replace(pair, teacher=str(write_model(tmp_path / "other", **shape)))
    found = problems(other, "precision.teacher_fp8.format=e4m3")
    assert any(f"multiples of 16, and {name} of the teacher is none" in line for line in found), found
    assert problems(other) == []
    assert problems(other, "precision.student_fp8.format=e4m3") == []


def test_tensor_parallelism_decides_whether_a_matrix_fits(
    pair: TrainConfig, hopper: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = dataclasses.replace(pair, student=str(write_model(tmp_path / "other", intermediate_size=80)))
    fp8 = "precision.student_fp8.format=e4m3"
    assert problems(other, fp8, "parallel.tensor=1", nproc=2) == []
    assert "intermediate_size / parallel.tensor 2 = 40" in only(problems(other, fp8, nproc=2))


@pytest.mark.parametrize(
    ("recipe", "tensor", "sequence_parallel", "multiple"),
    [
        ("delayed", 2, False, 16),
        ("tensorwise", 2, True, 32),
        ("blockwise", 1, True, 16),
        ("blockwise", 4, True, 512),
        (None, 4, True, 4),
        (None, 4, False, 1),
    ],
)
def test_tokens_come_in_multiples_that_every_rank_can_quantise(
    recipe: str | None, tensor: int, sequence_parallel: bool, multiple: int
) -> None:
    assert token_multiple(recipe, tensor, sequence_parallel) == multiple


def test_a_token_budget_that_is_no_multiple_is_refused(pair: TrainConfig, hopper: pytest.MonkeyPatch) -> None:
    settings = ("precision.student_fp8.format=e4m3", "parallel.microbatch_tokens=1000")
    assert "set parallel.microbatch_tokens=1008" in only(problems(pair, *settings))
    assert problems(pair, settings[1]) == []


# ---------------------------------------------------------------------------------------------------- the rest


def test_fp8_parameters_of_the_student_need_the_distributed_optimizer(
    pair: TrainConfig, hopper: pytest.MonkeyPatch
) -> None:
    fp8 = ("precision.student_fp8.format=e4m3", "precision.student_fp8.param=true")
    assert "needs parallel.distributed_optimizer = True" in only(problems(pair, *fp8))
    assert problems(pair, *fp8, "parallel.distributed_optimizer=true") == []


def test_a_teacher_is_measured_by_its_own_tensor_parallelism(
    pair: TrainConfig, hopper: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = dataclasses.replace(pair, teacher=str(write_model(tmp_path / "other", intermediate_size=80)))
    fp8 = "precision.teacher_fp8.format=e4m3"
    assert "intermediate_size / parallel.teacher_tensor 2 = 40 of the teacher" in only(problems(other, fp8))
    assert problems(other, fp8, "parallel.teacher_tensor=1") == []


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_fp8_parameters_are_not_offloaded(pair: TrainConfig, hopper: pytest.MonkeyPatch, role: str) -> None:
    fp8 = (f"precision.{role}_fp8.format=e4m3", f"precision.{role}_fp8.param=true")
    memory = (f"memory.offload_{role}=true", "parallel.distributed_optimizer=true")
    assert f"memory.offload_{role} = True does not go with" in only(problems(pair, *fp8, *memory))
    assert problems(pair, fp8[0], f"memory.offload_{role}=true") == []


def test_the_cpu_has_one_quantisation_of_rollouts(pair: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "has_gpu", lambda: False)
    assert problems(pair, "rollout.quantization=fp8_per_channel") == []
    line = only(problems(pair, "rollout.quantization=fp8"))
    assert "needs a CUDA GPU" in line and "choose fp8_per_channel" in line
    line = only(problems(pair, "rollout.quantization=fp8_per_channel", "precision.params=fp32"))
    assert "needs precision.params = bf16" in line
    monkeypatch.setattr(check, "has_gpu", lambda: True)
    assert problems(pair, "rollout.quantization=fp8", "rollout.kv_cache_dtype=fp8") == []


def test_an_fp8_kv_cache_on_the_cpu_needs_wide_vectors_and_whole_heads(
    pair: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(check, "has_gpu", lambda: False)
    monkeypatch.setattr(precision, "has_wide_vectors", lambda: True)
    whole = dataclasses.replace(pair, student=str(write_model(tmp_path / "whole", head_dim=32)))
    assert problems(whole, "rollout.kv_cache_dtype=fp8") == []
    assert "head_dim that is a multiple of 32, and the student's is 16" in only(
        problems(pair, "rollout.kv_cache_dtype=fp8")
    )
    monkeypatch.setattr(precision, "has_wide_vectors", lambda: False)
    assert "AVX-512" in only(problems(whole, "rollout.kv_cache_dtype=fp8_e5m2"))


def test_memory_settings_pass_everywhere(pair: TrainConfig) -> None:
    """On the CPU they are only a dry run."""
    memory = MemoryConfig(sleep_level=2, offload_student=True, offload_optimizer=True, offload_teacher=True)
    assert problems(dataclasses.replace(pair, memory=memory)) == []


# ---------------------------------------------------------------------------------------------------- look-ups


def made_up_package(folder: Path, name: str, *files: str, version: str | None = None) -> None:
    for file in ("__init__.py", *files):
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise ImportError('a look-up must not import')\n")
    if version:
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("files", "version", "problem"),
    [
        (("pytorch/__init__.py", "wheel_lib/transformer_engine_torch.cpython-311.so"), "2.11.0", None),
        (("pytorch/__init__.py", "transformer_engine_torch.abi3.so"), "2.2.0", "version 2.2.0 is older than 2.3"),
        (("pytorch/__init__.py",), "2.11.0", "has no PyTorch extension"),
        (("common/__init__.py",), "2.11.0", "has no PyTorch extension"),
    ],
)
def test_a_half_installed_transformer_engine_is_told_from_a_whole_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: tuple[str, ...],
    version: str,
    problem: str | None,
) -> None:
    made_up_package(tmp_path, "transformer_engine", *files, version=version)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    found = transformer_engine_problem()
    assert found is None if problem is None else problem in str(found)


@pytest.mark.parametrize(
    ("line", "version"),
    [("cuda: Optional[str] = '12.8'", (12, 8)), ("cuda = '13.0'", (13, 0)), ("cuda: Optional[str] = None", None)],
)
def test_torch_is_asked_for_its_cuda_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, version: tuple[int, int] | None
) -> None:
    made_up_package(tmp_path, "torch", "version.py")
    (tmp_path / "torch" / "version.py").write_text(f"debug = False\n{line}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert cuda_of_torch() == version
