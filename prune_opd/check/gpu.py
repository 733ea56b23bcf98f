"""What a machine with a GPU must have before a job takes it: imports that work, folders for what is compiled.

Nothing heavy is imported in this process: what may fail is tried in another one.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from prune_opd.check.machine import writable_problems

IMPORT_SECONDS = 300
# What imports Transformer Engine's compiled half, and what takes that for megatron-core.
ENGINE_IMPORT = "import transformer_engine.pytorch, megatron.core.extensions.transformer_engine as e; assert e.HAVE_TE"
APEX_KERNEL = "fused_weight_gradient_mlp_cuda"
# Compilers' folders → where each is when nothing names it. A container keeps neither the home directory nor /tmp.
CACHES = {
    "VLLM_CACHE_ROOT": "~/.cache/vllm",
    "FLASHINFER_WORKSPACE_BASE": "~",
    "TRITON_CACHE_DIR": "~/.triton/cache",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp",
}


def import_problems(program: Sequence[str] = (sys.executable,)) -> list[str]:
    """Why Transformer Engine, which is installed, or apex's kernel cannot be imported; a line each.

    megatron-core goes on without an engine that fails, with slower layers and no FP8, and says so in a warning.
    """
    found = []
    if importlib.util.find_spec("transformer_engine") is not None and (reason := _failure(program, ENGINE_IMPORT)):
        found.append(
            f"Transformer Engine is installed and cannot be imported ({reason}): install what it lacks "
            "(docker/pins.h100.txt has the set that goes together), or remove it"
        )
    if importlib.util.find_spec(APEX_KERNEL) is not None and (
        reason := _failure(program, f"import torch, {APEX_KERNEL}")
    ):
        found.append(
            f"apex's {APEX_KERNEL} is installed and cannot be imported ({reason}): build NVIDIA's apex again for this "
            "torch, or remove it"
        )
    return found


def _failure(program: Sequence[str], statement: str) -> str | None:
    try:
        done = subprocess.run([*program, "-c", statement], capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"not done after {IMPORT_SECONDS} s"
    lines = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else (lines[-1] if lines else f"exit code {done.returncode}")


def cache_problems(environment: Mapping[str, str] | None = None) -> list[str]:
    """Folders that vLLM, FlashInfer, Triton and torch compile into and that cannot be written, a line each."""
    environment = os.environ if environment is None else environment
    problems = []
    for name, usual in CACHES.items():
        place = Path(environment.get(name) or usual).expanduser()
        problems += writable_problems(f"{name}, where a GPU's kernels are compiled into,", place)
    return problems
