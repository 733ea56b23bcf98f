"""A rank's resident memory by owner, between two steps of `prune-opd bench peers`: imports, tensors, and the rest."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.common import resident

if TYPE_CHECKING:
    from torch import Tensor

IMPORTS, REST = "memory_imports", "memory_rest"
PRESENT = 1 << 63  # of a page's entry in /proc/self/pagemap
ENTRY_BYTES = 8


def by_owner(imports: int, tensors: Mapping[str, Iterable[Tensor]]) -> dict[str, float]:
    """Bytes: of the imports as measured, of each owner's tensors what is resident, and of the rest what is left.

    imports: resident bytes before a model was read. The rest: buffers, what the allocator keeps, later imports.
    """
    found = {f"memory_{owner}": float(present_bytes(of)) for owner, of in tensors.items()}
    return {IMPORTS: imports, **found, REST: resident() - imports - sum(found.values())}


def present_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages that are resident, a storage that several share once; whole pages at its ends."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    pages: set[int] = set()
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        for begin, size in storages.items():
            if not size:
                continue
            first, last = begin // mmap.PAGESIZE, (begin + size - 1) // mmap.PAGESIZE
            pagemap.seek(first * ENTRY_BYTES)
            entries = np.frombuffer(pagemap.read((last - first + 1) * ENTRY_BYTES), dtype=np.uint64)
            pages.update((first + np.flatnonzero(entries & np.uint64(PRESENT))).tolist())
    return len(pages) * mmap.PAGESIZE
