"""Hold the image's packages and our code together, on a machine without a GPU: `make test-h100`.

Each step runs in a process of its own, in .venv-h100: packages and our modules are imported together, recipes are
checked, engines are configured, the trainer and the loss run on CUDA tensors without data (scripts/h100/ has them).
What they say goes to docker/h100-check.txt, with the date, the commit and the versions; a step alone replaces its part
there. Exit code 1 if one has failed.

    python scripts/h100_check.py [--out FILE] [STEP …]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
RESULT = REPOSITORY / "docker" / "h100-check.txt"
SECONDS = 1800  # of a step
# fmt: off
PACKAGES = (
    "torch", "triton", "megatron-core", "transformer-engine", "transformer-engine-torch", "vllm", "flashinfer-python",
    "transformers", "fused-weight-gradient-mlp-cuda",
)
# fmt: on
# Step → what it shows; scripts/h100/STEP.py is the program.
STEPS = {
    "imports": "the packages, and every module of ours, in one process",
    "recipes": "prune-opd check of every recipe: as on this machine, and as on one with a GPU",
    "engines": "vLLM's configuration of every recipe's engine, on an H100 that is a stub",
    "fake_cuda": "trainer and loss of a recipe on CUDA tensors without data: forward",
}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit(folder: Path = REPOSITORY) -> str:
    """Of the checkout; with a plus where tracked files differ from it."""
    found = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=folder, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def run_step(name: str, folder: Path = REPOSITORY / "scripts" / "h100") -> tuple[bool, list[str]]:
    """Whether the step's program ended well, and what it said: of one that failed, the end of its errors too."""
    program = [sys.executable, str(folder / f"{name}.py")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    try:
        done = subprocess.run(program, capture_output=True, text=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return False, [f"not done after {SECONDS} s"]
    lines = [*done.stdout.splitlines(), f"{time.perf_counter() - begin:.0f} s"]
    return done.returncode == 0, lines if done.returncode == 0 else lines + done.stderr.splitlines()[-12:]


def block_of(name: str) -> tuple[bool, str]:
    """Whether the step passed, and its part of the report."""
    when, which = f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC", commit()
    passed, said = run_step(name)
    head = f"{'passed' if passed else 'FAILED'} {name} ({when}, commit {which}): {STEPS[name]}"
    return passed, "\n".join([head, *(f"  {line}" for line in said)])


def report(blocks: Mapping[str, str]) -> str:
    """The whole text. blocks: by step."""
    head = [
        "The H100 image's packages on a machine without a GPU: make test-h100 (docs/gpu.md says what this cannot show)",
        f"Python {platform.python_version()}",
        *(f"  {package} {version(package)}" for package in PACKAGES),
    ]
    return "\n\n".join(["\n".join(head), *(blocks[name] for name in STEPS if name in blocks)]) + "\n"


def blocks_in(text: str) -> dict[str, str]:
    """The blocks of an earlier report, by step."""
    found = (re.match(r"(?:passed|FAILED) (\w+) ", block) for block in text.split("\n\n"))
    return {match[1]: match.string.rstrip("\n") for match in found if match}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}; none: all")
    parser.add_argument("--out", type=Path, default=RESULT, help="the report (default: docker/h100-check.txt)")
    given = parser.parse_args()
    if unknown := set(given.steps) - STEPS.keys():
        parser.error(f"STEP {', '.join(sorted(unknown))}: there are {', '.join(STEPS)}")
    blocks = blocks_in(given.out.read_text(encoding="utf-8")) if given.out.is_file() else {}
    good = True
    for name in given.steps or STEPS:
        passed, blocks[name] = block_of(name)
        good &= passed
        print(blocks[name], end="\n\n", flush=True)
        given.out.write_text(report(blocks), encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
