"""Notes which lines of prune_opd/ a Python process runs, where PRUNE_OPD_LINES names a folder (scripts/test.sh).

A .pth file, there while the tests run, makes every process of .venv import this when it starts. slipcover writes the
notes into the code when that is imported. A tracer, coverage.py's on Python 3.11, would be called for each line and
function of torch and vLLM too: the tests of config/ and method/ need 17.2 CPU seconds under it, 11.5 with notes, 10.8
with neither.

What ran is in a file of the folder at the end of a process, of a forked rank too; a killed process leaves nothing.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

SOURCE = str(Path(__file__).resolve().parents[2] / "prune_opd") + os.sep
NEVER = 2**31 - 1  # a note is not taken out again once its line has run: that walks through every function there is


class Finder:
    """Finds the modules of the package as the other finders do (an editable install has its own), to put notes in."""

    def __init__(self, notes: Any, loader: Any) -> None:
        self.notes, self.loader = notes, loader

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] != "prune_opd":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.origin and os.path.abspath(spec.origin).startswith(SOURCE):
            spec.loader = self.loader(self.notes, spec.loader, spec.origin)
        return spec


def start(folder: Path) -> None:
    from slipcover.importer import SlipcoverLoader
    from slipcover.slipcover import Slipcover

    notes = Slipcover(d_miss_threshold=NEVER, exclude_lines=[])  # report.py leaves out what does not count
    sys.meta_path.insert(0, Finder(notes, SlipcoverLoader))  # type: ignore[arg-type]

    def write() -> None:
        os.chdir(SOURCE)  # slipcover names files from here; registered first, this comes last
        seen = {name: file["executed_lines"] for name, file in notes.get_coverage()["files"].items()}
        text = json.dumps({name: lines for name, lines in seen.items() if lines})
        part = folder / f"{os.getpid()}-{time.time_ns()}.part"
        part.write_text(text, encoding="utf-8")
        part.rename(part.with_suffix(".json"))  # a process that is killed while it writes leaves nothing either

    atexit.register(write)


start(Path(os.environ["PRUNE_OPD_LINES"]))
