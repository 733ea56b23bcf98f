"""Where `objective.kernels = triton` can be had."""

from __future__ import annotations

import importlib.util
import os

INTERPRETER = "TRITON_INTERPRET"  # Triton's own variable: 1 has kernels run on the host, line by line
REMEDY = "leave it at objective.kernels=torch"


def kernels_problem(kernels: str, gpu: bool) -> str | None:
    """Why these kernels cannot run on this machine; None if they can. Imports nothing."""
    if kernels != "triton":
        return None
    if not gpu and os.environ.get(INTERPRETER) != "1":
        return (
            f"objective.kernels = triton needs a GPU, and there is none here: {REMEDY}, or set the environment's "
            f"{INTERPRETER}=1 to have Triton interpret them on the CPU, which is for tests: it takes seconds for a "
            "handful of tokens"
        )
    if importlib.util.find_spec("triton") is None:
        return (
            f"objective.kernels = triton needs the package triton, and it is not installed: {REMEDY}, or install the "
            "version in docker/pins.h100.txt"
        )
    return None
