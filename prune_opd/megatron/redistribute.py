"""Teacher hidden states on their way from the teacher's last stage to the student's last stage.

The two models may lie differently over the same ranks: another TP, another pipeline, and so another number of replicas
that share the rows. Every rank knows both deals of the rows, works out all routes and does its part of the job's
all-to-alls. A row goes to every last-stage rank of the student's replica that trains on it. A rank that has it already
keeps it, which costs no traffic. All others get it from one rank, and no rank holds a row that it neither sends nor
uses. The senders take turns by the tokens that they have to send.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.config.memory_phases import EXCHANGE_BYTES
from prune_opd.megatron.layout import ModelLayout
from prune_opd.rollout.balance import Deal

Routes = dict[tuple[int, int], list[int]]
"""routes[source rank, destination rank] = row numbers, ascending."""


@dataclass(frozen=True)
class TeacherHidden:
    """hidden_TH of the rows that this rank's loss needs: the positions that predict a response token, in order."""

    of_row: dict[int, Tensor]
    nothing: Tensor  # [0, H]: of a micro-batch without rows

    def packed(self, rows: Sequence[int]) -> Tensor:
        """hidden_MH of a micro-batch of these rows."""
        return torch.cat([self.nothing, *(self.of_row[row] for row in rows)])


@dataclass(frozen=True)
class KeptHidden:
    """Whole rows that the teacher went through already: which ranks hold each, and those of this rank.

    whole_batches: they are whole micro-batches of the teacher's deal, and the others shall stay as they are.
    """

    holders_of: dict[int, tuple[int, ...]] = field(default_factory=dict)
    of_row: dict[int, Tensor] = field(default_factory=dict)
    whole_batches: bool = False


def replica_of_row(deals: Sequence[Deal]) -> dict[int, int]:
    """The data-parallel rank of every row that is dealt."""
    return {row: rank for deal in deals for rank, dealt in enumerate(deal) for row in chain.from_iterable(dealt)}


def find_routes(
    holders_of: Mapping[int, Sequence[int]],
    student_replica: Mapping[int, int],
    student: ModelLayout,
    lengths: Sequence[int],
) -> Routes:
    """Who sends which row to whom. Every destination gets a row once, all but its holders from the same rank.

    holders_of: the ranks that have, or could have, each row. lengths: tokens of every row.
    """
    routes: Routes = {}
    sent: dict[int, int] = {}  # tokens, by rank
    for row in sorted(student_replica):
        holders, destinations = holders_of[row], student.last_stage_ranks(student_replica[row])
        sender = min(holders, key=lambda rank: (sent.get(rank, 0), rank))
        for destination in destinations:
            source = destination if destination in holders else sender
            routes.setdefault((source, destination), []).append(row)
            if source != destination:
                sent[source] = sent.get(source, 0) + lengths[row]
    return routes


def sources_of_row(routes: Routes) -> dict[int, tuple[int, ...]]:
    """The ranks that must hold each row: those that send it or use it themselves."""
    found: dict[int, set[int]] = {}
    for (source, _), rows in routes.items():
        for row in rows:
            found.setdefault(row, set()).add(source)
    return {row: tuple(sorted(ranks)) for row, ranks in found.items()}


def in_rounds(routes: Routes, lengths: Sequence[int], most: int) -> list[Routes]:
    """The routes between different ranks, in rounds in which a rank sends at most `most` tokens, or one row."""
    rounds: list[Routes] = []
    at: dict[int, tuple[int, int]] = {}  # of each source: its round, and the tokens in that
    for (source, destination), rows in sorted(routes.items()):
        for row in rows if source != destination else ():
            number, tokens = at.get(source, (0, 0))
            if tokens and tokens + lengths[row] > most:
                number, tokens = number + 1, 0
            at[source] = number, tokens + lengths[row]
            rounds += [{} for _ in range(number + 1 - len(rounds))]
            rounds[number].setdefault((source, destination), []).append(row)
    return rounds


def redistribute(
    mine: Mapping[int, Tensor],
    lengths: Sequence[int],
    routes: Routes,
    nothing: Tensor,
    round_bytes: int = EXCHANGE_BYTES,
) -> TeacherHidden:
    """Exchange rows along the routes. Collective over the whole job.

    mine: [lengths[row], H] of the rows that this rank has. nothing: an empty [0, H] of their dtype and device.
    Needs, beside the rows to send, the rows to receive and a copy of `round_bytes` of the former.
    """
    rank = dist.get_rank()
    of_row = {row: mine[row] for row in routes.get((rank, rank), ())}
    most = max(1, round_bytes // (nothing.shape[1] * nothing.element_size()))
    for part in in_rounds(routes, lengths, most):
        of_row.update(_exchange(mine, lengths, part, nothing))
    return TeacherHidden(of_row, nothing)


def _exchange(
    mine: Mapping[int, Tensor], lengths: Sequence[int], routes: Routes, nothing: Tensor
) -> Iterable[tuple[int, Tensor]]:
    rank, ranks = dist.get_rank(), range(dist.get_world_size())
    outgoing = [routes.get((rank, other), []) for other in ranks]
    incoming = [routes.get((other, rank), []) for other in ranks]
    sent = torch.cat([nothing, *(mine[row] for rows in outgoing for row in rows)])
    to_get = [sum(lengths[row] for row in rows) for rows in incoming]
    to_send = [sum(lengths[row] for row in rows) for rows in outgoing]
    received = nothing.new_empty(sum(to_get), nothing.shape[1])
    dist.all_to_all_single(received, sent, to_get, to_send)
    rows = list(chain.from_iterable(incoming))
    parts = received.split([lengths[row] for row in rows]) if rows else ()
    return zip(rows, parts, strict=True)
