"""Which rows go to which data-parallel rank, in which micro-batch; and what padding them would have cost.

Pure Python on the rows' lengths. Every rank knows them all, works out the whole deal and takes its own part.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from prune_opd.errors import UserError

Deal = list[list[list[int]]]
"""deal[rank][micro-batch] = row numbers, ascending."""


def deal(lengths: Sequence[int], rows: Sequence[int], ranks: int, token_budget: int, multiple_of: int = 1) -> Deal:
    """`rows`, of lengths[row] tokens, for `ranks` data-parallel ranks: micro-batches of at most `token_budget` tokens.

    - Every row is dealt once; a row longer than the budget stands alone.
    - Every rank gets the same number of micro-batches, a multiple of `multiple_of` (an interleaved pipeline wants its
      size), and at least one row: ranks that share experts run every micro-batch together.
    - The number is the smallest at which spreading the longest rows first (each to the micro-batch that has fewest
      tokens) keeps the budget. Two ranks' tokens differ by at most the longest row, and the i-th micro-batches of all
      ranks are of about one size; the largest comes first, where memory that does not suffice shows at once.
    - Where the rows do not fill the last micro-batches of some ranks, those are empty lists.
    - Only lengths decide: rows of equal length may change places and nothing else changes.

    Tokens are what is balanced, for memory and for compute. Attention's quadratic part is left out: balanced by tokens,
    256 rows of up to 13,000 on 8 ranks leave the slowest rank of a 1.5 B model 1 to 3 % of its operations above the
    mean, where dealing in turns leaves 17 to 23 %.

    Raises:
        UserError: fewer than ranks * multiple_of rows.
    """
    if len(rows) < ranks * multiple_of:
        each = "one" if multiple_of == 1 else f"{multiple_of} micro-batches of one"
        raise UserError(
            f"{len(rows)} responses in an update are too few for {ranks} data-parallel ranks with {each} each:"
            f" generate at least {ranks * multiple_of} (rollout.prompts * rollout.responses /"
            " optimizer.updates_per_batch), or use fewer ranks"
        )
    longest_first = sorted(rows, key=lambda row: (-lengths[row], row))
    # Each micro-batch takes one budget's worth of tokens, and one of the rows that are longer than half of it.
    full = math.ceil(sum(min(lengths[row], token_budget) for row in rows) / token_budget)
    needed = max(full, sum(2 * lengths[row] > token_budget for row in rows), 1)
    count = multiple_of * math.ceil(needed / (ranks * multiple_of))
    while True:  # ends at the latest when every row stands alone
        bins = _spread(lengths, longest_first, ranks * count)
        if all(len(filled) <= 1 or sum(lengths[row] for row in filled) <= token_budget for filled in bins):
            return _share(lengths, bins, ranks)
        count += multiple_of


def deal_any(lengths: Sequence[int], rows: Sequence[int], ranks: int, token_budget: int) -> Deal:
    """`deal` for any number of rows: with fewer than ranks, some ranks get a micro-batch without rows."""
    if len(rows) >= ranks:
        return deal(lengths, rows, ranks, token_budget)
    return [[[rows[rank]] if rank < len(rows) else []] for rank in range(ranks)]


def _spread(lengths: Sequence[int], longest_first: Sequence[int], count: int) -> list[list[int]]:
    """The rows in `count` bins of about equal sums: each row to the bin that has fewest tokens."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, 0, index) for index in range(count)]  # tokens, rows, bin
    for row in longest_first:
        tokens, rows, index = heap[0]
        heapq.heapreplace(heap, (tokens + lengths[row], rows + 1, index))
        bins[index].append(row)
    return bins


def _share(lengths: Sequence[int], bins: list[list[int]], ranks: int) -> Deal:
    """Bins to ranks, in rounds of one each: of a round's bins the larger goes to the rank that has fewer tokens."""
    tokens = [sum(lengths[row] for row in rows) for rows in bins]
    largest_first = sorted(range(len(bins)), key=lambda index: (-tokens[index], index))
    dealt: Deal = [[] for _ in range(ranks)]
    total = [0] * ranks
    for first in range(0, len(bins), ranks):
        poorest_first = sorted(range(ranks), key=lambda rank: (total[rank], rank))
        for rank, index in zip(poorest_first, largest_first[first : first + ranks], strict=True):
            dealt[rank].append(sorted(bins[index]))
            total[rank] += tokens[index]
    return dealt


def padded_size(tokens: int, multiple: int) -> int:
    """Tokens of a micro-batch with its dummies: the next multiple, and never nothing."""
    return multiple * max(1, math.ceil(tokens / multiple))


def packing_record(
    lengths: Sequence[int], deals: Sequence[Deal], multiple: int = 1, row_multiple: int = 1
) -> dict[str, float]:
    """What packing saved, for a step record of metrics.jsonl (track/metrics.py has the meanings).

    lengths: tokens of every row of the global batch. deals: one of each update. multiple, row_multiple: what the tokens
    of a micro-batch, and of each of its rows, are filled up to.
    """
    real = sum(lengths)
    packed = [
        [
            sum(padded_size(sum(padded_size(lengths[row], row_multiple) for row in rows), multiple) for rows in part)
            for part in dealt
        ]
        for dealt in deals
    ]  # [update][rank]
    everything = sum(map(sum, packed))
    slowest = sum(map(max, packed))  # the ranks wait for each other once an update
    return {
        "padding_waste_padded": 1 - real / (len(lengths) * max(lengths)),
        "padding_waste_packed": 1 - real / everything,
        "dp_imbalance": slowest * len(packed[0]) / everything,
    }
