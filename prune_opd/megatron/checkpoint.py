"""The `checkpoints/` folder of a run: student and optimizer as shards, everything else as readable JSON.

    step_N.XXXX.partial/   shards (shards.py: written by a child process of each rank while the next steps run)
                           + state.json + manifest.json, each flushed to the disk
    → step_N/              one rename, when everything is there
    → latest               the pointer moves last

So a kill at any moment leaves the last good checkpoint in place. A checkpoint is held against its manifest before it is
loaded; a damaged one is passed over for the one before it, and the run says so.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from prune_opd.config import CheckpointConfig
from prune_opd.errors import UserError
from prune_opd.megatron import manifest
from prune_opd.megatron.layout import Layout
from prune_opd.megatron.shards import ShardWriter, WriteError, load_shards

if TYPE_CHECKING:
    from prune_opd.megatron.trainer import Trainer

STATE_FILE = "state.json"
LATEST = "latest"
PARTIAL = "step_*.partial"


@dataclass(frozen=True)
class _Saving:
    """A save that a child process is at."""

    step: int
    partial: Path
    state: str  # of state.json


class Checkpoints:
    """The `checkpoints/` folder of a run. Every method but `latest` is collective."""

    def __init__(self, directory: Path, config: CheckpointConfig, layout: Layout):
        self.directory, self.config, self.layout = directory, config, layout
        self._writer = ShardWriter(layout.student.groups.dp_cp)
        self._saving: _Saving | None = None

    def latest(self) -> Path | None:
        """What the pointer names; None in a fresh run, or if it cannot be read or names no folder."""
        try:
            name = (self.directory / LATEST).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return None
        return self.directory / name if _step_of(name) is not None and (self.directory / name).is_dir() else None

    # ------------------------------------------------------------------------------------------------ saving

    def save(self, step: int, trainer: Trainer, state: dict[str, Any], any_layout: bool = True) -> None:
        """Begin to write `step_N`: the trainer's shards and `state` (JSON values). Waits for the save before it.

        any_layout: whether other layouts than this one can load it, which costs host memory on every rank.
        The tensors are those of this moment: training may go on at once. Raises `UserError` on every rank when the disk
        refuses, here or (asynchronous) from `poll` or `finish`; the last good checkpoint is then as it was.
        """
        self.finish()
        layout = None if any_layout else self._sizes()
        text = json.dumps({"step": step, "layout": layout, **state}, indent=1)
        name = f"step_{step:06d}.{secrets.token_hex(4)}.partial"
        partial = self.directory / self._together(lambda: name)[0]  # a name of its own: a killed save may still write
        self._together(lambda: self._make_room(partial) if self.layout.is_main else None, partial)
        try:
            self._writer.begin(trainer.sharded_state(loading=False, any_layout=any_layout), partial)
        except (OSError, RuntimeError) as error:  # of rank 0, which writes what has no shards
            raise self._failure(partial, str(error)) from error
        self._saving = _Saving(step, partial, text)
        if not self.config.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Complete the save under way if every rank has written its part. Costs a reduction of one number."""
        self._complete(blocking=False)

    def finish(self) -> None:
        """Wait for the save under way and complete it."""
        self._complete(blocking=True)

    def _complete(self, blocking: bool) -> None:
        """Once every byte of the shards is written: describe them, rename, move the pointer."""
        saving, main = self._saving, self.layout.is_main
        if saving is None:
            return
        partial = saving.partial
        try:
            if not self._writer.is_done(blocking):
                return
        except WriteError as error:
            self._saving = None
            raise self._failure(partial, str(error)) from error
        self._saving = None
        self._together(lambda: manifest.write_durably(partial / STATE_FILE, saving.state) if main else None, partial)
        names = self._together(lambda: manifest.files_of(partial) if main else [], partial)[0]
        mine = names[self.layout.rank :: self.layout.world]
        shares: list[dict[str, manifest.FileRecord]] = self._together(
            lambda: {name: manifest.record_durably(partial / name) for name in mine}, partial
        )
        files = {name: record for share in shares for name, record in share.items()}
        self._together(lambda: self._publish(saving, files) if main else None, partial)

    def _make_room(self, partial: Path) -> None:
        """Remove what killed saves have left, and make the folder of this one."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in (*self.directory.glob(PARTIAL), *self.directory.glob("step_*.replaced")):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()

    def _publish(self, saving: _Saving, files: dict[str, manifest.FileRecord]) -> None:
        partial = saving.partial
        manifest.write_durably(
            partial / manifest.MANIFEST, json.dumps({"step": saving.step, "files": files}, indent=1, sort_keys=True)
        )
        manifest.sync_folder(partial)
        final = self.directory / f"step_{saving.step:06d}"
        replaced = final.with_name(final.name + ".replaced")
        if final.exists():  # a step that was trained again: `latest` may point to it, so it goes in one move
            final.rename(replaced)
        partial.rename(final)
        manifest.sync_folder(self.directory)
        pointer = self.directory / (LATEST + ".partial")
        manifest.write_durably(pointer, final.name)
        pointer.rename(self.directory / LATEST)
        manifest.sync_folder(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)
        for old in self._superseded(final):
            shutil.rmtree(old)

    def _superseded(self, final: Path) -> list[Path]:
        """What goes now that `final` is there: all but the newest `keep`, and but each `keep_every`-th step.

        Steps beyond `final` are of a continuation that was given up: they never push the new one out.
        """
        every = self.config.keep_every
        others = [path for path in self._complete_ones() if path != final]
        old = others[: max(0, len(others) - (self.config.keep - 1))]
        return [path for path in old if not (every and (_step_of(path.name) or 0) % every == 0)]

    def _complete_ones(self) -> list[Path]:
        return sorted(
            (p for p in self.directory.glob("step_*") if _step_of(p.name) is not None), key=_minus, reverse=True
        )

    def _failure(self, partial: Path, reason: str) -> UserError:
        free = f"{shutil.disk_usage(self.directory).free / 2**20:.1f} MiB were free" if self.directory.exists() else ""
        if self.layout.is_main:
            shutil.rmtree(partial, ignore_errors=True)  # a disk that is full needs the room
        last = self.latest()
        kept = f"the last good one, {last.name}, is untouched" if last else "there was none before it"
        step = _step_of(partial.name.partition(".")[0])
        return UserError(
            f"the checkpoint of step {step} could not be written to {self.directory} ({reason}; {free}); {kept}: "
            "put the disk right and run the same command again"
        )

    def _together(self, work: Callable[[], Any], partial: Path | None = None) -> list[Any]:
        """What `work` gives on each rank. If the disk refused on one, `UserError` on all of them."""
        mine: tuple[Any, str | None]
        try:
            mine = (work(), None)
        except OSError as error:
            mine = (None, str(error))
        everyone: list[Any] = [None] * self.layout.world
        dist.all_gather_object(everyone, mine)
        failed = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(everyone) if error]
        if failed:
            raise self._failure(partial or self.directory, "; ".join(failed))
        return [found for found, _ in everyone]

    # ------------------------------------------------------------------------------------------------ loading

    def to_resume(self, resume: str) -> tuple[Path | None, list[str]]:
        """The checkpoint to go on from, and what is to be said about the choice. resume: auto, never or a path."""
        if resume == "never":
            return None, []
        if resume == "auto":
            return self.newest_good()
        if problem := self.problem_with(Path(resume)):
            raise UserError(f"--resume {resume}: {problem}; take --resume auto, or an earlier checkpoint")
        return Path(resume), []

    def newest_good(self) -> tuple[Path | None, list[str]]:
        """The checkpoint to go on from, and what was wrong with those that were passed over. None in a fresh run.

        The pointer's comes first, then the ones before it, newest first. Raises `UserError` if none can be used.
        """
        pointed: Path | None
        found: list[Path]
        pointed, found = self._together(lambda: (self.latest(), self._complete_ones()))[0]
        order = sorted(found, key=lambda path: (pointed is not None and _minus(path) < _minus(pointed), _minus(path)))
        notes = []
        if found and pointed is None:
            notes.append(f"{self.directory / LATEST} is missing or cannot be read: looking for the newest checkpoint")
        for path in order:
            problem = self.problem_with(path)
            if problem is None:
                return path, notes
            notes.append(f"{path.name} is damaged and passed over: {problem}")
        if found:
            raise UserError(
                f"{self.directory} has no checkpoint that can be used ({'; '.join(notes)}): restore one, or start "
                "anew in another --run-dir"
            )
        return None, notes

    def problem_with(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint's files; None if they are as they were written. Each rank reads a share."""

        def names() -> tuple[dict[str, manifest.FileRecord], str | None]:
            try:
                return manifest.read_manifest(checkpoint), None
            except ValueError as error:
                return {}, str(error)

        files, problem = self._together(names)[0]
        if problem:
            return problem
        mine = sorted(files)[self.layout.rank :: self.layout.world]
        problems = self._together(lambda: [p for name in mine if (p := manifest.damage(checkpoint, name, files[name]))])
        return "; ".join(p for share in problems for p in share) or None

    def load(self, checkpoint: Path, trainer: Trainer) -> dict[str, Any]:
        """Restore the trainer in this run's layout and return the rest.

        Raises `UserError` for an incomplete one, and for one that only another layout can load.
        """
        state = read_state(checkpoint)
        if (theirs := state.get("layout")) not in (None, self._sizes()):
            raise UserError(
                f"{checkpoint} was written as its ranks held it ({_in_words(theirs)}), and this run has "
                f"{_in_words(self._sizes())}: resume in that layout, or from a checkpoint that any layout loads (that "
                "of a last step, or with checkpoint.any_layout=always)"
            )
        wanted = trainer.sharded_state(loading=True, any_layout=theirs is None)
        trainer.load(load_shards(wanted, checkpoint, self.layout.student.groups.dp_cp))
        return state

    def _sizes(self) -> dict[str, int]:
        """The sizes of a layout that decide which parameters a rank holds, and in which order."""
        student = self.layout.student
        return {
            "tensor": student.tp,
            "pipeline": student.pp,
            "virtual_pipeline": student.vp,
            "expert": student.ep,
            "context": student.cp,
        }


def read_state(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise UserError(
            f"{checkpoint} is not a checkpoint (no {STATE_FILE}): give a step_N folder of a run's checkpoints/"
        )
    return json.loads(path.read_text())


def _in_words(sizes: dict[str, int]) -> str:
    return ", ".join(f"parallel.{name} = {size}" for name, size in sizes.items())


def _step_of(name: str) -> int | None:
    """The step of a complete checkpoint's name; None for any other name."""
    match = re.fullmatch(r"step_(\d{6,})", name)
    return int(match[1]) if match else None


def _minus(path: Path) -> int:
    return -(_step_of(path.name) or 0)
