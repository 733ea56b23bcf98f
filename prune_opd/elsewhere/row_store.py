"""What a teacher knows of single rows, on disk: written once, checked at every reading, shared by several runs.

    DIR / TEACHER / ab / abcdef….safetensors        one file a row

TEACHER is a digest of the teacher (`elsewhere/teacher_digest.py`), abcdef… one of the ids that it has read and of those
that it has judged (`row_key`). Both stand in the file too, with a checksum over them and every byte of the tensors. So
another checkpoint, precision, prompt or response has another name, and a file that was cut off, changed or renamed is
never taken for a row: reading it raises `DamagedRowError`.

A file appears under its name when it is complete. Several runs may use one folder at the same time: they write the same
rows, and a file that another run has thrown out is one that is not there.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import time
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT = "prune-opd row 1"  # another number for every change of what a file's tensors mean
PARTIAL = ".partial"
FORGOTTEN = 3600.0  # seconds after which a file that is not complete is a dead run's
_ROW = re.compile(r"[0-9a-f]{32}\.safetensors")
_TEACHER = re.compile(r"[0-9a-f]{32}")


class DamagedRowError(Exception):
    """A file that is not the row that its name says. The text names the file and what is wrong."""


class Shape(NamedTuple):
    """What a row's tensor must be."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def row_key(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
    """The name of a row, 32 hex digits: of the ids that the teacher reads before the response, and of the response."""
    digest = hashlib.blake2b(digest_size=16)
    for ids in (prompt_ids, response_ids):
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(array("q", ids).tobytes())
    return digest.hexdigest()


class RowStore:
    """One teacher's rows in a folder that may hold other teachers' too. max_bytes: of all of them together."""

    def __init__(self, folder: Path, teacher: str, max_bytes: int) -> None:
        self.folder, self.teacher, self.max_bytes = folder, teacher, max_bytes
        self._used: int | None = None  # bytes in the folder when they were last counted, and what was written since
        self._written = 0

    def path(self, key: str) -> Path:
        return self.folder / self.teacher / key[:2] / f"{key}.safetensors"

    def read(self, key: str, expected: Mapping[str, Shape]) -> dict[str, Tensor] | None:
        """The row's tensors on the host; None if it is not there. Raises `DamagedRowError`."""
        path = self.path(key)
        try:
            with safe_open(path, "pt") as file:
                marks = file.metadata() or {}
                found = {name: file.get_tensor(name).clone() for name in file.offset_keys()}  # not a view of the file
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError) as reason:
            raise DamagedRowError(f"{path} cannot be read ({reason})") from None
        for name, value in (("format", FORMAT), ("teacher", self.teacher), ("row", key)):
            if marks.get(name) != value:
                raise DamagedRowError(f"{path} says {name} = {marks.get(name)!r} and its name {value!r}")
        shapes = {name: Shape(tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}
        if shapes != dict(expected):
            raise DamagedRowError(f"{path} holds {_in_words(shapes)} instead of {_in_words(expected)}")
        if marks.get("checksum") != _checksum(self.teacher, key, found):
            raise DamagedRowError(f"{path} has another checksum than its numbers")
        # The oldest to go is the one that was not needed for longest. Another run may have thrown it out just now, or
        # it is another user's: the numbers are good all the same.
        with suppress(OSError):
            os.utime(path)
        return found

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> int:
        """Keep a row; returns the bytes written. Raises OSError where the disk does not take it.

        Nothing waits for the disk (no fsync): what a power failure leaves of a file has another checksum.
        """
        path = self.path(key)
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        marks = {"format": FORMAT, "teacher": self.teacher, "row": key, "checksum": _checksum(self.teacher, key, held)}
        content = save(held, marks)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{PARTIAL}")
        try:
            partial.write_bytes(content)
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        return len(content)

    def remove(self, key: str) -> None:
        """Take a damaged row away."""
        self.path(key).unlink(missing_ok=True)

    def make_room(self, needed: int) -> bool:
        """Throw out the oldest rows, of any teacher, until `needed` bytes more fit. One rank calls it for all.

        Whether they fit now. The folder is counted again when it seems full, and after every twentieth of it that
        this run has written: other runs may write too.
        """
        if needed > self.max_bytes:
            return False
        stale = self._used is None or self._written > self.max_bytes // 20
        if self._used is None or stale or self._used + self._written + needed > self.max_bytes:
            self._used, self._written = self._throw_out(needed), 0
        self._written += needed
        return True

    def _throw_out(self, needed: int) -> int:
        rows = sorted(files(self.folder))
        used, most = sum(size for _, size, _ in rows), self.max_bytes - needed
        if used > most:
            most = min(most, int(0.9 * self.max_bytes))  # not a few rows again at every step
        for _, size, path in rows:
            if used <= most:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used


class Kept(NamedTuple):
    """A row's file: when it was needed last, its size, where it is."""

    used_at: float
    size: int
    path: Path


def files(folder: Path) -> list[Kept]:
    """The rows of all teachers in a folder. What a dead run has left half-written is removed."""
    found = []
    for path in (path for teacher in _folders(folder) for part in teacher.iterdir() for path in _inside(part)):
        try:
            seen = path.stat()
            if path.name.endswith(PARTIAL) and seen.st_mtime < time.time() - FORGOTTEN:
                path.unlink()
            elif _ROW.fullmatch(path.name):
                found.append(Kept(seen.st_mtime, seen.st_size, path))
        except FileNotFoundError:
            continue  # another run was faster
    return found


def _folders(folder: Path) -> list[Path]:
    return [path for path in _inside(folder) if _TEACHER.fullmatch(path.name) and path.is_dir()]


def _inside(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _checksum(teacher: str, key: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(f"{FORMAT} {teacher} {key}".encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {Shape(tensor.dtype, tuple(tensor.shape))}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _in_words(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items())) or "nothing"
