"""What a complete folder holds: the size and checksum of each file, and writing that outlives a power cut.

The manifest is written last, so a folder that has one was complete. Large folders are checked by several ranks, each
taking a share of the files; nothing here communicates.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FileRecord = dict[str, Any]  # {"bytes": …, "sha256": …}


def files_of(folder: Path) -> list[str]:
    """The relative names of the folder's files but the manifest, in order."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in paths if path.name != MANIFEST)


def record_durably(path: Path) -> FileRecord:
    """Flush a file to the disk and describe it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """File → record. Raises `ValueError` in words when there is none or it cannot be read."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {
            str(name): {"bytes": int(record["bytes"]), "sha256": record["sha256"]} for name, record in files.items()
        }
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}, so it was never completed") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its {MANIFEST} cannot be read ({error})") from error


def damage(folder: Path, name: str, record: FileRecord) -> str | None:
    """What is wrong with a file, in words; None if it is as it was written."""
    path = folder / name
    try:
        size = path.stat().st_size
        if size != record["bytes"]:
            return f"{name} has {size} bytes instead of {record['bytes']}"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"]:
                return f"{name} has another checksum than when it was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def write_durably(path: Path, text: str) -> None:
    """Write a file and flush it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries: a rename is only then certain to outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
