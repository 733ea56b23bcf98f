"""The KV cache of an engine on a CPU: no larger than it can be filled, and resident only where it is.

torch fills the cache with zeros when an engine starts, which makes every page of it resident; and vLLM takes the block
that was free for longest, so a run would come to touch all of them in turn. After each load of weights nothing in the
cache is of use any more: its pages go back to the system, which gives zeros where it is read again.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

from prune_opd.rollout.request import CPU_BLOCK

MADV_DONTNEED = 4  # Linux: the pages of private memory are zeros from then on
SPARE = 8  # blocks: one that vLLM keeps empty, and some that are free when all responses run


def cache_bytes(limit: int, sequences: int, longest: int, token_bytes: int) -> int:
    """Bytes of a cache in which `sequences` sequences of `longest` tokens have room at a time, at most `limit`."""
    blocks = sequences * -(-longest // CPU_BLOCK) + SPARE
    return min(limit, blocks * CPU_BLOCK * token_bytes)


def give_pages_back(worker: Any) -> None:
    """In vLLM's worker: empty the cache's memory. Nothing may be running."""
    storages = {cache.untyped_storage().data_ptr(): cache for cache in worker.model_runner.kv_caches}
    for begin, cache in storages.items():
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (begin + cache.untyped_storage().nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < end:
            _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), MADV_DONTNEED)


_libc = ctypes.CDLL(None, use_errno=True)
