"""Numbers in the loss that no GPU has chosen: blocks of the top-k, tiles and warps of the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from prune_opd.config import ObjectiveConfig
from prune_opd.config.kernels import kernels_problem
from prune_opd.loss import triton_passes, vocab_parallel
from prune_opd.platform import Platform
from scripts.gpu.loss import _backward, _inputs, _least
from scripts.gpu.rows import Row, Size

BLOCKS = (32, 64, 128, 256)  # columns, of which the maximum is taken first
LAUNCHES = ((1024, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8), (4096, 16))  # columns of a tile, warps
K = 16
NEAR = 1.1  # of the least time: what the product has is left as it is
KERNELS = ObjectiveConfig("full_vocab_reverse_kl", kernels="triton")


def variants_step(machine: Platform, size: Size) -> Iterator[Row]:
    """Each variant gives the same numbers; whether the product's is among the quickest."""
    for columns in sorted({columns for _, _, columns in size.pairs}):
        yield from _blocks(machine, size, columns)
    if problem := kernels_problem("triton", not machine.is_cpu):
        yield Row("variants", "tiles and warps", f"not here ({problem.partition(':')[0]})", "", None)
        return
    yield from _launches(machine, size)


def _blocks(machine: Platform, size: Size, columns: int) -> Iterator[Row]:
    """Exact top-k of both models' logits: of all columns at once, and by maxima of blocks."""
    width, k = -(-columns // max(BLOCKS)) * max(BLOCKS), min(K, max(columns // (4 * max(BLOCKS)), 1))
    draw = torch.Generator(machine.device).manual_seed(0)
    # Rounded, so that some are equal.
    logits = torch.randn(2, size.chunk, width, generator=draw, device=machine.device).bfloat16().float()
    logits[..., columns:] = vocab_parallel.NOTHING

    def top(block: int) -> Tensor:
        with mock.patch.object(vocab_parallel, "BLOCK", block):
            return vocab_parallel.local_topk(logits, k).ids_NK

    whole = top(2 * width)  # no such block is there
    same = sum(torch.equal(top(block), whole) for block in BLOCKS)
    what = f"top {k} of {columns} columns"
    yield Row("variants", f"{what}: by blocks as of all", f"{same} of {len(BLOCKS)}", "all", same == len(BLOCKS))
    calls: dict[int, Callable[[], Any]] = {block: partial(top, block) for block in BLOCKS}
    yield _quickest(machine, f"{what}: by block", calls, vocab_parallel.BLOCK)
    seconds = _least(machine, partial(top, 2 * width))
    yield Row("variants", f"{what}: of all at once", f"{1e3 * seconds:.2f} ms", "", None)


def _launches(machine: Platform, size: Size) -> Iterator[Row]:
    """The loss and its gradients by the kernels of each tile and number of warps."""
    inputs = _inputs(machine, size, torch.bfloat16, torch.bfloat16)

    def gradients(launch: tuple[int, int]) -> tuple[Tensor, ...]:
        tile, warps = launch
        with mock.patch.multiple(triton_passes, TILE=tile, WARPS=warps):
            found: tuple[Tensor, ...] = _backward(inputs, size, KERNELS)
            return found

    ours = (triton_passes.TILE, triton_passes.WARPS)
    launches = (LAUNCHES[0], ours) if machine.is_cpu else LAUNCHES  # interpreted, each takes seconds
    exact, most = gradients(ours), 0.0
    for launch in launches:
        for one, other in zip(gradients(launch), exact, strict=True):
            most = max(most, float((one.double() - other.double()).norm() / other.double().norm()))
    yield Row("variants", "gradients by tiles and warps", f"{most:.1e} apart", "< 1e-2", most < 1e-2)
    yield _quickest(machine, "loss by tile, warps", {one: partial(gradients, one) for one in launches}, ours)


def _quickest(machine: Platform, what: str, calls: Mapping[Any, Callable[[], Any]], ours: Any) -> Row:
    seconds = {variant: _least(machine, call) for variant, call in calls.items()}
    figure = "; ".join(f"{variant}: {1e3 * taken:.2f} ms" for variant, taken in seconds.items())
    near = None if machine.is_cpu else seconds[ours] <= NEAR * min(seconds.values())
    return Row("variants", what, figure, f"{ours} within 10 % of the least", near)
