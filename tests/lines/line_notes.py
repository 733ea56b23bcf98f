"""Notes which lines of prune_opd/ a Python process runs, where PRUNE_OPD_LINES names a folder (scripts/test.sh).

A .pth file, there while the tests run, makes every process of .venv import this when it starts. slipcover writes the
notes into the code when that is imported. A tracer, coverage.py's on Python 3.11, would be called for each line and
function of torch and vLLM too: the tests of config/ and method/ need 17.2 CPU seconds under it, 11.5 with notes, 10.8
with neither.

Putting the notes in takes longer than the imports, so the first process that imports a module leaves its code in the
folder, with the notes as plain numbers: the imports of `prune-opd train` take that one 1.4 CPU seconds, the next .3.

What ran is in a file of the folder at the end of a process, of a forked rank too; a killed process leaves nothing.
"""

from __future__ import annotations

import atexit
import json
import marshal
import os
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any
from unittest.mock import patch

SOURCE = str(Path(__file__).resolve().parents[2] / "prune_opd") + os.sep
NEVER = 2**31 - 1  # a note is not taken out again once its line has run: that walks through every function there is


class Probes:
    """Stands for slipcover's probes while it puts them in: their lines, which can be in a file."""

    MARK = "line_notes"
    signal = (MARK, 0)

    @staticmethod
    def new(notes: Any, file: str, line: int, threshold: int) -> tuple[str, int]:
        return Probes.MARK, line


class Loader:
    """Loads a module as another loader does, with notes in its code."""

    def __init__(self, notes: Any, kept: Path, loader: Any) -> None:
        self.notes, self.kept, self.loader = notes, kept, loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        source = os.stat(module.__file__ or "")
        file = self.kept / f"{module.__name__}-{source.st_size}-{source.st_mtime_ns}"
        try:
            lines, code = marshal.loads(file.read_bytes())
        except FileNotFoundError:
            lines, code = self._noted(module.__name__)
            part = file.with_name(f"{file.name}.{os.getpid()}")
            part.write_bytes(marshal.dumps((lines, code)))
            part.rename(file)
        self.notes.code_lines[code.co_filename].update(lines)
        exec(self._with_probes(code), module.__dict__)

    def _noted(self, name: str) -> tuple[list[int], CodeType]:
        """All lines of a module, and its code with `Probes`."""
        code = self.loader.get_code(name)
        with patch("slipcover.slipcover.probe", Probes):
            return sorted(set(self.notes.lines_from_code(code))), self.notes.instrument(code)

    def _with_probes(self, code: CodeType) -> CodeType:
        from slipcover import probe  # type: ignore[attr-defined]

        found = []
        for part in code.co_consts:
            if isinstance(part, CodeType):
                part = self._with_probes(part)
            elif isinstance(part, tuple) and part[:1] == (Probes.MARK,):
                part = probe.new(self.notes, code.co_filename, part[1], NEVER) if part[1] else probe.signal
            found.append(part)
        return code.replace(co_consts=tuple(found))


class Finder:
    """Finds the modules of the package as the other finders do (an editable install has its own), to put notes in."""

    def __init__(self, notes: Any, kept: Path) -> None:
        self.notes, self.kept = notes, kept

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] != "prune_opd":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.origin and os.path.abspath(spec.origin).startswith(SOURCE):
            spec.loader = Loader(self.notes, self.kept, spec.loader)  # type: ignore[assignment]
        return spec


def start(folder: Path) -> None:
    from slipcover.slipcover import Slipcover

    notes = Slipcover(d_miss_threshold=NEVER, exclude_lines=[])  # report.py leaves out what does not count
    kept = folder / "code"
    kept.mkdir(exist_ok=True)
    sys.meta_path.insert(0, Finder(notes, kept))  # type: ignore[arg-type]

    def write() -> None:
        os.chdir(SOURCE)  # slipcover names files from here; registered first, this comes last
        seen = {name: file["executed_lines"] for name, file in notes.get_coverage()["files"].items()}
        text = json.dumps({name: lines for name, lines in seen.items() if lines})
        part = folder / f"{os.getpid()}-{time.time_ns()}.part"
        part.write_text(text, encoding="utf-8")
        part.rename(part.with_suffix(".json"))  # a process that is killed while it writes leaves nothing either

    atexit.register(write)


start(Path(os.environ["PRUNE_OPD_LINES"]))
