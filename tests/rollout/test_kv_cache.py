"""The KV cache on a CPU: as large as it can be used, and given back to the system while nothing is in it."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import torch

from prune_opd.rollout.kv_cache import SPARE, cache_bytes, give_pages_back
from prune_opd.rollout.request import CPU_BLOCK, cached_tokens

MIB = 2**20


def test_the_cache_holds_every_sequence_at_its_longest_and_no_more() -> None:
    token_bytes = 2048
    found = cache_bytes(2**30, sequences=32, longest=312, token_bytes=token_bytes)
    assert found == (32 * 3 + SPARE) * CPU_BLOCK * token_bytes
    assert cached_tokens(found / 2**30, token_bytes) >= 32 * 312


def test_the_limit_stays_one() -> None:
    assert cache_bytes(10 * MIB, sequences=256, longest=4096, token_bytes=2048) == 10 * MIB


def test_pages_are_given_back_and_read_as_zeros_and_what_is_beside_them_stays() -> None:
    """Each layer's cache is a view; two layers may share a storage."""
    whole = torch.ones(64 * MIB, dtype=torch.int8)
    beside = [torch.full((1000,), 7, dtype=torch.int8) for _ in range(3)]
    before = psutil.Process().memory_info().rss
    caches = [whole[: 32 * MIB].view(2, -1), whole[32 * MIB :].view(2, -1)]
    give_pages_back(SimpleNamespace(model_runner=SimpleNamespace(kv_caches=caches)))
    assert before - psutil.Process().memory_info().rss > 60 * MIB
    assert whole[4096:-4096].count_nonzero() == 0
    assert all((each == 7).all() for each in beside)
    whole.fill_(3)
    assert (whole == 3).all()
