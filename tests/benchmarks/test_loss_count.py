"""What a chunk of the loss asks of a device, held where it is: it cannot be timed here, so it is counted."""

from __future__ import annotations

import pytest
import torch

from benchmarks.loss.count import Count, count

SIZES = (1536, 3584)
VOCAB, CHUNK = 151_936, 1024


def test_a_chunk_on_one_rank_has_sixty_kernels_and_never_waits() -> None:
    found = count({}, 1, VOCAB, SIZES, CHUNK)
    assert found["waits"] == found["collectives"] == 0
    assert found["kernels"] <= 60
    student, teacher = found["passes"]
    assert student <= 6 and teacher <= 5


def test_a_chunk_of_a_sharded_vocabulary_has_one_pair_of_collectives() -> None:
    found = count({}, 8, VOCAB, SIZES, CHUNK)
    assert (found["waits"], found["collectives"]) == (0, 2)
    assert found["kernels"] <= 80


@pytest.mark.parametrize("objective", [{"tail": "bucket"}, {"name": "full_vocab_reverse_kl"}, {"support": "union"}])
def test_no_objective_waits(objective: dict[str, str]) -> None:
    assert count(objective, 1, VOCAB, SIZES, 64)["waits"] == 0


def test_what_is_counted_is_seen() -> None:
    """A wait stops the count or is in it; a pass is one for each model that it goes through."""
    logits = torch.empty(2, 8, 128, device="meta")
    with Count(8, 128) as mode, pytest.raises((RuntimeError, NotImplementedError)):
        logits.sum().item()
    with Count(8, 128) as mode:
        torch.tensor([1, 2])
        logits.exp_()
        logits[1].sum(1)
        logits.view(2, 8, 128).gather(2, torch.empty(2, 8, 3, dtype=torch.int64, device="meta"))
    counts = mode.counts
    assert (counts.waits, counts.passes) == (1, (1, 2))
    assert counts.by_kernel == {"exp_": 1, "sum": 1, "gather": 1}
    assert counts.gbytes == pytest.approx((2 * 2048 + 1024) * 4 / 1e9)
