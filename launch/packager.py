"""What a job brings along, as a packager of NeMo-Run: the text of an own recipe, as it was when it was read."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import nemo_run as run


@dataclass(kw_only=True)
class Brought(run.Packager):
    """Files by name. NeMo-Run unpacks them into `code/` of the job's folder, and copies or mounts that folder.

    PatternPackager would do for most names: it hands names to `find` without quotes, and reads the files again for
    every job and every dry run.
    """

    files: dict[str, str] = field(default_factory=dict)

    def package(self, path: Path, job_dir: str, name: str) -> str:
        """The archive's path. path: unused, our files are texts."""
        target = Path(job_dir, f"{name}.tar.gz")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(target, "w:gz") as archive:
            for file, text in self.files.items():
                data = text.encode()
                entry = tarfile.TarInfo(file)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
        return str(target)
