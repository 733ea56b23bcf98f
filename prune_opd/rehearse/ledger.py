"""Bytes of live device tensors, by part and phase: counted when a storage is made, and again when it goes."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

WORK = "work"  # what belongs to no part: activations, logits, buckets


@dataclass
class Peak:
    """The fullest moment of a phase: bytes by part, and how much of it there was no part for.

    began: what there was no part for when the phase began that had this moment.
    """

    began: int = 0
    total: int = 0
    by_part: dict[str, int] = field(default_factory=dict)

    @property
    def work(self) -> int:
        return self.by_part.get(WORK, 0)


@dataclass
class _Block:
    """One storage: its bytes now, and the part that they count for."""

    nbytes: int
    part: str
    reference: Any  # weak, to the storage


class Ledger:
    """Every storage on the device that has been seen, until it is freed."""

    def __init__(self) -> None:
        self._blocks: dict[int, _Block] = {}
        self._ignored: set[int] = set()
        self._counting = True
        self.by_part: defaultdict[str, int] = defaultdict(int)
        self.live = 0
        self.phase, self._began = "build", 0
        self.peaks: dict[str, Peak] = {}

    def enter(self, phase: str) -> None:
        self.phase, self._began = phase, self.by_part[WORK]
        self._look_for_a_peak()

    def see(self, tensor: Tensor) -> None:
        """Count the storage of a device tensor, if it is a new one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._blocks or key in self._ignored:
            return
        if not self._counting:
            self._ignored.add(key)
            weakref.finalize(storage, self._ignored.discard, key)
            return
        nbytes = storage.nbytes()
        self._blocks[key] = _Block(nbytes, WORK, weakref.ref(storage, self._freed(key)))
        self._add(WORK, nbytes)

    @contextmanager
    def not_counting(self) -> Iterator[None]:
        """What is made in here has bytes that another storage has, which is counted."""
        self._counting = False
        try:
            yield
        finally:
            self._counting = True

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage has been emptied or filled again under its tensors."""
        if block := self._blocks.get(storage._cdata):
            nbytes = storage.nbytes()
            self._add(block.part, nbytes - block.nbytes)
            block.nbytes = nbytes

    def label(self, part: str, tensors: Iterable[Tensor]) -> int:
        """Count the storages under these device tensors as `part`; its bytes now."""
        for tensor in tensors:
            if tensor.device.type != "meta":
                continue
            self.see(tensor)
            block = self._blocks[tensor.untyped_storage()._cdata]
            if block.part == WORK:
                self._add(WORK, -block.nbytes)
                block.part = part
                self._add(part, block.nbytes)
        return self.by_part[part]

    def largest(self, count: int = 3) -> list[int]:
        """The largest storages that belong to no part now [bytes]."""
        return sorted((block.nbytes for block in self._blocks.values() if block.part == WORK), reverse=True)[:count]

    def _freed(self, key: int) -> Callable[[Any], None]:
        def freed(_: Any) -> None:
            if block := self._blocks.pop(key, None):
                self._add(block.part, -block.nbytes)

        return freed

    def _add(self, part: str, nbytes: int) -> None:
        self.by_part[part] += nbytes
        self.live += nbytes
        if nbytes > 0:
            self._look_for_a_peak()

    def _look_for_a_peak(self) -> None:
        peak = self.peaks.setdefault(self.phase, Peak())
        if self.live > peak.total:
            peak.total, peak.by_part, peak.began = self.live, dict(self.by_part), self._began
