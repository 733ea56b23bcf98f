"""The deal: which rows go to which data-parallel rank, in which micro-batch; and what padding would have cost.

Pure Python on the rows' lengths. Every rank knows all of them, works out the whole deal and takes its own part.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from prune_opd.errors import UserError

Deal = list[list[list[int]]]
"""deal[rank][micro-batch] = row numbers, ascending."""


def deal(
    lengths: Sequence[int],
    rows: Sequence[int],
    ranks: int,
    token_budget: int,
    multiple_of: int = 1,
    begun: Sequence[int] | None = None,
) -> Deal:
    """`rows`, of lengths[row] tokens, for `ranks` data-parallel ranks: micro-batches of at most `token_budget` tokens.

    - Every row is dealt once; a row longer than the budget stands alone.
    - Every rank gets at least one row, and the same number of micro-batches: ranks that share experts run every
      micro-batch together. The number is a multiple of `multiple_of`; an interleaved pipeline needs that of its stages.
    - The rows are spread longest first, each to the micro-batch with the fewest tokens. The number of micro-batches is
      the smallest that keeps the budget this way.
    - The tokens of two ranks differ by at most the longest row. The i-th micro-batches of all ranks have about the same
      size. The largest comes first, so that a lack of memory shows at once.
    - Where the rows do not fill the last micro-batches of some ranks, those are empty lists.
    - Only lengths decide: if two rows of equal length are swapped, nothing else changes.

    Tokens are balanced, for memory and for compute. Attention's quadratic part is left out: with 256 rows of up to
    13,000 tokens on 8 ranks the slowest rank of a 1.5 B model has 1 to 3 % more operations than the mean. Dealing in
    turns would make that 17 to 23 %.

    begun: tokens that each rank has already, which the balance goes on from.

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
    longest_first = _longest_first(lengths, rows)
    # A micro-batch holds at most the budget, and at most one of the rows that are longer than half of it.
    full = math.ceil(sum(min(lengths[row], token_budget) for row in rows) / token_budget)
    needed = max(full, sum(2 * lengths[row] > token_budget for row in rows), 1)
    count = multiple_of * math.ceil(needed / (ranks * multiple_of))
    while True:  # ends at the latest when every row stands alone
        bins = _spread(lengths, longest_first, ranks * count)
        if all(len(filled) <= 1 or sum(lengths[row] for row in filled) <= token_budget for filled in bins):
            return _deal_bins(lengths, bins, ranks, begun)
        count += multiple_of


def deal_any(lengths: Sequence[int], rows: Sequence[int], ranks: int, token_budget: int) -> Deal:
    """`deal` for any number of rows: if there are fewer rows than ranks, some ranks get a micro-batch without rows."""
    if len(rows) >= ranks:
        return deal(lengths, rows, ranks, token_budget)
    return [[[rows[rank]] if rank < len(rows) else []] for rank in range(ranks)]


def _spread(lengths: Sequence[int], longest_first: Sequence[int], count: int) -> list[list[int]]:
    """The rows in `count` bins of about equal sums: each row goes to the bin with the fewest tokens."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, 0, index) for index in range(count)]  # tokens, rows, bin
    for row in longest_first:
        tokens, rows, index = heap[0]
        heapq.heapreplace(heap, (tokens + lengths[row], rows + 1, index))
        bins[index].append(row)
    return bins


def deal_groups(
    lengths: Sequence[int], groups: Sequence[Sequence[int]], ranks: int, token_budget: int, multiple_of: int = 1
) -> Deal:
    """`deal` for rows that must not share a micro-batch with those of another group: one group after the other.

    Every rank gets the same number of micro-batches of each group, so some may be empty where a group has few rows.
    Each group's deal makes up for what the ones before have left uneven; within a group's tokens, not beyond.
    """
    rows = sum(map(len, groups))
    if rows < ranks * multiple_of or len(groups) == 1:
        return deal(lengths, [row for group in groups for row in group], ranks, token_budget, multiple_of)
    dealt: Deal = [[] for _ in range(ranks)]
    begun = [0] * ranks
    for group in groups:
        enough = len(group) >= ranks * multiple_of
        part = (
            deal(lengths, group, ranks, token_budget, multiple_of, begun)
            if enough
            else _deal_bins(
                lengths, _spread(lengths, _longest_first(lengths, group), ranks * multiple_of), ranks, begun
            )
        )
        for rank, batches in enumerate(part if group else ()):
            dealt[rank] += batches
            begun[rank] += sum(lengths[row] for batch in batches for row in batch)
    return dealt


def _longest_first(lengths: Sequence[int], rows: Sequence[int]) -> list[int]:
    return sorted(rows, key=lambda row: (-lengths[row], row))


def _deal_bins(lengths: Sequence[int], bins: list[list[int]], ranks: int, begun: Sequence[int] | None = None) -> Deal:
    """Bins to ranks, one each a round: in a round, the larger a bin the fewer tokens has the rank that gets it."""
    tokens = [sum(lengths[row] for row in rows) for rows in bins]
    largest_first = sorted(range(len(bins)), key=lambda index: (-tokens[index], index))
    dealt: Deal = [[] for _ in range(ranks)]
    total = list(begun or [0] * ranks)
    for first in range(0, len(bins), ranks):
        poorest_first = sorted(range(ranks), key=lambda rank: (total[rank], rank))
        for rank, index in zip(poorest_first, largest_first[first : first + ranks], strict=True):
            dealt[rank].append(sorted(bins[index]))
            total[rank] += tokens[index]
    return dealt


def padded_size(tokens: int, multiple: int) -> int:
    """Tokens of a micro-batch with its padding: the next multiple, at least one."""
    return multiple * max(1, math.ceil(tokens / multiple))


def packing_record(
    lengths: Sequence[int], deals: Sequence[Deal], multiple: int = 1, row_multiple: int = 1
) -> dict[str, float]:
    """What packing saved, for a step record of metrics.jsonl (track/assets/metrics.yaml has the meanings).

    lengths: tokens of every row of the global batch. deals: one for each update. multiple, row_multiple: the tokens of
    a micro-batch, and of each of its rows, are padded to a multiple of these.
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
