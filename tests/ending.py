"""A case for `objective.ends`: several ids end a response, and some of the sampled ones are such ids."""

from __future__ import annotations

import dataclasses

from prune_opd.config import ObjectiveConfig
from tests.reference import OBJECTIVES, Case, make_case

TERMINAL_IDS = (3, 20, 22, 47)  # on four ranks: one on the first, two on the second, one on the third
AS_CLASS = [dataclasses.replace(objective, ends="class") for objective in OBJECTIVES]
CLASS = ObjectiveConfig(k=6, ends="class")


def ending_case(lengths: tuple[int, ...] = (9, 0, 1, 14, 0), seed: int = 0) -> Case:
    """A pair whose models prefer different ends: every third token sampled is one of them."""
    case = make_case(lengths, seed)
    sampled = case.sampled.clone()
    for number, t in enumerate(range(0, len(sampled), 3)):
        sampled[t] = TERMINAL_IDS[number % len(TERMINAL_IDS)]
    return dataclasses.replace(case, sampled=sampled, terminal_ids=TERMINAL_IDS)
