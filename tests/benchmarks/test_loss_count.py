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


# Objective → passes through the student's and the teacher's logits by our own kernels.
PASSES = {
    "topk_reverse_kl": (2, 1),
    "sampled_token": (2, 1),
    "topk_jsd": (2, 1),
    "full_vocab_reverse_kl": (2, 2),
    "full_vocab_forward_kl": (2, 2),
    "full_vocab_mixed_kl": (2, 2),
    "full_vocab_jsd": (3, 3),
    "priced_reverse_kl": (3, 1),
}


@pytest.mark.parametrize("name", PASSES)
def test_our_own_kernels_take_three_passes_at_most(name: str) -> None:
    found = count({"name": name, "kernels": "triton"}, 1, VOCAB, SIZES, CHUNK)
    assert found["passes"] == PASSES[name] and max(PASSES[name]) <= 3
    assert found["waits"] == found["collectives"] == 0
    assert found["by_kernel"]["loss_statistics"] == found["by_kernel"]["loss_gradient_"] == 1
    plain = count({"name": name}, 1, VOCAB, SIZES, CHUNK)
    assert found["gbytes"] < plain["gbytes"] / 4 and found["kernels"] < plain["kernels"]


def test_a_support_with_a_rest_takes_one_more_and_no_more_than_three() -> None:
    assert count({"tail": "bucket", "kernels": "triton"}, 1, VOCAB, SIZES, CHUNK)["passes"] == (3, 2)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_kl_on_a_sharded_vocabulary_has_one_pair_of_collectives(kernels: str) -> None:
    found = count({"name": "full_vocab_reverse_kl", "kernels": kernels}, 8, VOCAB, SIZES, CHUNK)
    assert (found["waits"], found["collectives"]) == (0, 2)
    student, teacher = found["passes"]
    assert student <= 9 and teacher <= 8


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
