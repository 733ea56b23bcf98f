"""What every rank has read from its own files, and has to be the same: nodes may have different copies of a model."""

from __future__ import annotations

import socket
from typing import Any

import torch.distributed as dist

from prune_opd.errors import UserError


def must_agree(what: str, value: object, remedy: str) -> None:
    """Compare `value` between all ranks. Collective over the job.

    what, remedy: for the message. Raises `UserError` on all ranks where one has another value than rank 0.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (value, socket.gethostname()))
    first, host = everyone[0]
    others = [(rank, seen, where) for rank, (seen, where) in enumerate(everyone) if seen != first]
    if others:
        rank, seen, where = others[0]
        more = f", and {len(others) - 1} more ranks have another" if len(others) > 1 else ""
        raise UserError(
            f"{what} differ between the ranks: {first} on rank 0 ({host}), "
            f"{seen} on rank {rank} ({where}){more}: {remedy}"
        )
