"""A process that has imported what NeMo-Run imports, and forks dry runs from itself: that takes it three CPU seconds.

NeMo-Run itself, which reads its home while it is imported, and the command line are imported by each fork.

    .venv-launch/bin/python tests/launch/dry_runs.py

A line of JSON in, [words, environment, file of stdout, file of stderr]; a line with the exit code out.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

THEIRS = (
    "fiddle",
    "catalogue",
    "omegaconf",
    "torchx.runner",
    "networkx",
    "fabric",
    "rich.markdown",
    "typer.rich_utils",
)
OURS = ("launch.cluster", "launch.jobs", "launch.wish")


def dry_run(words: list[str], environment: dict[str, str], out: str, err: str) -> None:
    """As `python -m launch` in a new interpreter. Does not come back."""
    code: object = 1
    try:
        for file, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), file)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["launch", *words]
        runpy.run_module("launch", run_name="__main__", alter_sys=True)
    except SystemExit as reason:
        code = reason.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    for name in (*THEIRS, *OURS):
        importlib.import_module(name)
    assert "nemo_run" not in sys.modules and "launch.__main__" not in sys.modules
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            dry_run(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
