"""Hold the image's packages and our code together, on a machine without a GPU: `make test-h100`.

Each step runs in a process of its own, in .venv-h100: packages and our modules are imported together, recipes are
checked, engines are configured, the trainer and the loss run on CUDA tensors without data (scripts/h100/ has them).
What they say goes to docker/h100-check.txt, with the date, the commit and the versions. Exit code 1 if one has failed.

    python scripts/h100_check.py [--out FILE] [STEP …]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
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


def report(steps: Sequence[str]) -> tuple[bool, str]:
    """Whether all passed, and the text."""
    lines = [
        "The H100 image's packages on a machine without a GPU: make test-h100 (docs/gpu.md says what this cannot show)",
        f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, commit {commit()}, Python {platform.python_version()}",
        *(f"  {package} {version(package)}" for package in PACKAGES),
    ]
    good = True
    for name in steps:
        passed, said = run_step(name)
        good &= passed
        block = ["", f"{'passed' if passed else 'FAILED'} {name}: {STEPS[name]}", *(f"  {line}" for line in said)]
        print("\n".join(block), flush=True)
        lines += block
    return good, "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}; none: all")
    parser.add_argument("--out", type=Path, help="where the report goes (default, of all steps: docker/h100-check.txt)")
    given = parser.parse_args()
    if unknown := set(given.steps) - STEPS.keys():
        parser.error(f"STEP {', '.join(sorted(unknown))}: there are {', '.join(STEPS)}")
    good, text = report(given.steps or tuple(STEPS))
    if out := given.out or (None if given.steps else RESULT):
        out.write_text(text, encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
