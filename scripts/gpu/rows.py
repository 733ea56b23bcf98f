"""What a step of `make gpu-check` yields, and how large it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from prune_opd.platform import Platform


@dataclass(frozen=True)
class Row:
    """passed: None where there is nothing to hold the figure against, or the machine has no such thing."""

    step: str
    what: str
    figure: str
    expected: str
    passed: bool | None
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        return "–" if self.passed is None else "passed" if self.passed else "FAILED"


class Size(NamedTuple):
    """tokens to chunk: of the loss. pairs: hidden sizes of student and teacher, and columns, whose time is taken, in
    `chunks` of tokens. tied: rows whose logits are all equal. layers, row: of the model whose memory is measured."""

    tokens: int
    vocab: int
    hidden: int
    teacher_hidden: int
    chunk: int
    moved: int  # bytes; no power of two, to which pinned memory is rounded up
    pairs: tuple[tuple[int, int, int], ...]
    chunks: tuple[int, ...]
    tied: tuple[int, ...]
    layers: int
    width: int
    row: int
    rows: int


VOCAB = 151_936
# fmt: off
FULL = Size(
    2048, VOCAB, 1536, 3584, 1024, 5 * 2**28,
    ((1536, 3584, VOCAB), (4096, 5120, VOCAB), (4096, 5120, VOCAB // 8)), (1024, 2048, 4096), (0, 64, 1024),
    layers=28, width=1024, row=4096, rows=4,
)
SMALL = Size(
    48, 512, 32, 40, 16, 5 * 2**18, ((32, 40, 512),), (16, 48), (0, 8, 32), layers=1, width=64, row=24, rows=2,
)
# fmt: on
Step = Callable[[Platform, Size], Iterator[Row]]
