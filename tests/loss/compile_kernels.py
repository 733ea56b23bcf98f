"""Compile every kernel of the loss for a Hopper, without one: {kernel: [registers, bytes of stack]} of a thread.

Run by test_kernels.py with Triton on the path. The sizes are those of a real launch.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prune_opd.loss import triton_kernels as kernels
from prune_opd.loss.triton_passes import TILE, WARPS
from prune_opd.loss.vocab_parallel import BLOCK

HOPPER = GPUTarget("cuda", 90, 32)
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
LOGITS = kernels.Logits("*fp32", "*fp32", "i32")
POINTS = kernels.Points("*i64", "*fp32", "i32")
CONSTANTS = kernels.Constants("fp32", "fp32")


def compiled(kernel: Any, arguments: dict[str, Any], **constants: Any) -> list[int]:
    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    result = triton.compile(ASTSource(kernel, signature, at), target=HOPPER, options={"num_warps": WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        said = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = said.stdout + said.stderr
    found = {what: int(number) for what, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return [found["REG"], found["STACK"] + found["LOCAL"]]


def compile_all() -> dict[str, list[int]]:
    found = {
        "statistics": compiled(
            kernels.statistics_kernel,
            {"logits": LOGITS, "maxima": "*fp32", "sums": "*fp32"},
            TILE=TILE,
            BLOCK=BLOCK,
        ),
        "rest": compiled(
            kernels.rest_kernel,
            {"logits": "*fp32", "maximum": "*fp32", "columns": "*i64", "rest": "*fp32", "width": "i32", "count": "i32"},
            TILE=TILE,
        ),
    }
    given = {"logits": LOGITS, "norms": "*fp32"}
    for kind in ("priced", "jsd"):
        arguments = {**given, "sums": "*fp32", "prices": POINTS, "constants": CONSTANTS}
        found[f"divergence {kind}"] = compiled(kernels.divergence_kernel, arguments, KIND=kind, TILE=TILE)
    for kind in ("candidates", "kl", "priced", "jsd"):
        for dtype in ("*fp32", "*bf16"):
            arguments = {**given, "gradient": dtype, "slopes": POINTS, "prices": POINTS, "constants": CONSTANTS}
            found[f"gradient {kind} {dtype[1:]}"] = compiled(kernels.gradient_kernel, arguments, KIND=kind, TILE=TILE)
    return found


if __name__ == "__main__":
    print(json.dumps(compile_all()))
