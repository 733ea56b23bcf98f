"""Running sums along responses that are packed end to end and come in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """The next C tokens."""

    response_C: Tensor  # which response each belongs to
    continued_C: Tensor  # bool: whether that response began in an earlier piece
    first_C: Tensor  # where it begins in this one

    def sum_in_response(self, value_C: Tensor, carried: Tensor) -> Tensor:
        """Sum of a whole number from a token's response's begin up to and including the token, int64 [C].

        carried: that of the last token of the piece before.
        """
        total_C = value_C.cumsum(0)
        earlier_C = (total_C - value_C)[self.first_C]
        return total_C - earlier_C + carried * self.continued_C


class Pieces:
    """Where each token stands. cu_seqlens: the responses' B + 1 offsets on the host, from 0 to N, not decreasing."""

    def __init__(self, cu_seqlens: Sequence[int], device: torch.device | str) -> None:
        offset_B1 = torch.tensor(cu_seqlens, dtype=torch.int64)
        length_B = offset_B1.diff()
        response_N = torch.repeat_interleave(torch.arange(len(length_B)), length_B)
        self.length_B = length_B.to(device)
        self.response_N = response_N.to(device)
        self.start_N = offset_B1[:-1][response_N].to(device)  # where the response of each begins
        self.longest = int(length_B.max()) if len(length_B) else 0
        self._position = 0

    def next(self, count: int) -> slice:
        """Which the next `count` tokens are. ValueError when there are not so many."""
        begin, end = self._position, self._position + count
        if end > len(self.response_N):
            raise ValueError(f"event brings the tokens to {end}, but cu_seqlens ends at {len(self.response_N)}")
        self._position = end
        return slice(begin, end)

    def take(self, count: int) -> Piece:
        """The next `count` tokens. ValueError when there are not so many."""
        part = self.next(count)
        start_C = self.start_N[part]
        return Piece(self.response_N[part], start_C < part.start, (start_C - part.start).clamp(min=0))
