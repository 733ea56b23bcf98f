"""Teacher hidden states on their way from the teacher's last stage to the student's last stage.

The two models may lie differently over the same ranks: another TP, another pipeline, and so another number of replicas
that share the rows. Every rank knows both deals of the rows, works out all routes and does its part of one all-to-all
of the job. A row goes to every last-stage rank of the student's replica that trains on it, from a rank that has it
already if that is the same one (no traffic), else from the ranks of the teacher's replica in turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

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


def replica_of_row(deals: Sequence[Deal]) -> dict[int, int]:
    """The data-parallel rank of every row that is dealt."""
    return {row: rank for deal in deals for rank, dealt in enumerate(deal) for row in chain.from_iterable(dealt)}


def find_routes(
    teacher_replica: Mapping[int, int], student_replica: Mapping[int, int], teacher: ModelLayout, student: ModelLayout
) -> Routes:
    """Who sends which row to whom. Every destination gets a row once."""
    routes: Routes = {}
    for row in sorted(student_replica):
        holders = teacher.last_stage_ranks(teacher_replica[row])
        for i, destination in enumerate(student.last_stage_ranks(student_replica[row])):
            source = destination if destination in holders else holders[i % len(holders)]
            routes.setdefault((source, destination), []).append(row)
    return routes


def redistribute(mine: Mapping[int, Tensor], lengths: Sequence[int], routes: Routes, nothing: Tensor) -> TeacherHidden:
    """Exchange rows along the routes. Collective over the whole job.

    mine: [lengths[row], H] of the rows that this rank has. nothing: an empty [0, H] of their dtype and device.
    Needs the rows to send and the rows to receive twice over, for the contiguous buffers of the exchange.
    """
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
    return TeacherHidden(dict(zip(rows, parts, strict=True)), nothing)
