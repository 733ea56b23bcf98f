"""A folder with `make gpu-check` and what it needs beside torch and numpy: `make gpu-check-folder`.

For a machine with a GPU, torch 2.11 or later (with its Triton), numpy, no network and nothing else. Packages are
copied from this environment: Python, and two whose libraries are for every Python 3. Copy the folder there:

    python3 FOLDER/run.py [--out DIR] [--steps NAME …]

    python scripts/gpu_check_folder.py [FOLDER]      default: build/gpu-check
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
OURS = ("prune_opd", "recipes", "benchmarks", "scripts/gpu", "scripts/gpu_check.py")
# megatron-core and what it imports, then the product's, then those of the benchmarks whose contenders are measured.
# fmt: off
PACKAGES = (
    "megatron-core", "psutil", "packaging", "einops", "annotated-types", "safetensors", "PyYAML",
    "typer", "click", "shellingham", "annotated-doc", "rich", "pygments", "markdown-it-py", "mdurl",
)
# fmt: on
LIMIT = 64 * 2**20  # bytes
RUN = '''"""The check of a GPU with what lies beside this file, torch and numpy."""

import os
import runpy
import sys
from pathlib import Path

folder = Path(__file__).resolve().parent
found = [str(folder), str(folder / "packages")]
theirs = filter(None, [os.environ.get("PYTHONPATH")])
os.environ["PYTHONPATH"] = os.pathsep.join([*found, *theirs])  # of the processes that it starts
sys.path[:0] = found
runpy.run_path(str(folder / "scripts" / "gpu_check.py"), run_name="__main__")
'''


def our_files() -> Iterator[Path]:
    """Tracked ones, relative to the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *OURS],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    yield from map(Path, listed.stdout.splitlines())


def make(folder: Path) -> int:
    """Write the folder anew; its size [bytes]."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in our_files():
        _copy(REPOSITORY / path, folder / path)
    for name in PACKAGES:
        for path in importlib.metadata.files(name) or ():
            one_python = path.suffix == ".so" and not path.name.endswith(".abi3.so")  # quicker halves of what works
            if ".." not in path.parts and path.suffix != ".pyc" and not one_python:
                _copy(Path(path.locate()), folder / "packages" / path)
    (folder / "run.py").write_text(RUN, encoding="utf-8")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / "build" / "gpu-check"
    size = make(folder)
    print(f"{folder}: {size / 2**20:.1f} MiB; on a machine with a GPU: python3 {folder.name}/run.py")
    if size > LIMIT:
        print(f"error: it is to have at most {LIMIT / 2**20:.0f} MiB", file=sys.stderr)
    return int(size > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
