"""Ranks of test_known_top_tp.py: a teacher that is known at its best ids only, over a tensor-parallel group.

    torchrun … worker_known_top.py OUT TP ANSWERS

Groups of TP ranks; of several groups each has a part of the tokens, as context-parallel ranks have. Rank r writes
OUT/rank<r>.json: how far value, gradients and statistics are from the plain reference on the whole teacher.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from prune_opd.config import GateConfig, ObjectiveConfig, WeightingConfig
from prune_opd.loss import KnownTop
from tests.distributed.answers import ANSWERS, of_reference
from tests.distributed.shards import error, sharded
from tests.distributed.worker_context_loss import Ranks
from tests.distributed.worker_distill import compare_update, gradient_errors
from tests.loss.known_cases import SERVED_GATES, SERVED_OBJECTIVES, SERVED_WEIGHTINGS, KnownCase
from tests.reference import GATE, NO_WEIGHTING, describe, make_case

TEACHERS = ObjectiveConfig(k=6, support="teacher")
CASE = KnownCase.of(make_case((9, 0, 1, 14, 0, 30)))


def compare(
    ranks: Ranks,
    gate: GateConfig | None,
    objective: ObjectiveConfig,
    dtype: torch.dtype = torch.float64,
    weighting: WeightingConfig = NO_WEIGHTING,
) -> dict[str, float]:
    rounded = CASE.leaves(dtype)
    assert isinstance(rounded, KnownCase) and rounded.known is not None
    answer, reference = of_reference(rounded, gate, objective, weighting)
    if ranks.cp == 1:
        mine, context = sharded(rounded, ranks.tp_group).leaves(dtype), None
    else:
        mine, context = ranks.part(rounded, dtype)
        assert isinstance(mine, KnownCase)
        mine.known = KnownTop(*(of[context.index_N] for of in rounded.known))
    loss, _, stats = mine.fused(gate, objective, weighting, context, chunk=7, tp_group=ranks.tp_group)
    loss.backward()
    if context is None:
        errors = gradient_errors(loss, mine, answer, ranks.tp_group)
    else:
        errors = ranks.errors(loss, mine, context, answer)
    same = stats.event_N.tolist() == reference.event and stats.reliable_length_B.tolist() == reference.reliable_length
    seen = {"weight_N": reference.weight, "divergence_N": reference.divergence}
    apart = max(error(getattr(stats, name), torch.tensor(of, dtype=torch.float64)) for name, of in seen.items())
    unknown = stats.acceptance_N.isnan().all() and stats.teacher_entropy_N.isnan().all()
    return {**errors, "statistics": apart if same and unknown else math.inf}


def main(folder: Path, tp: int, answers: Path) -> None:
    dist.init_process_group("gloo")
    ANSWERS.open(answers)
    ranks = Ranks(tp, dist.get_world_size() // tp)
    results = {describe(objective): compare(ranks, GATE, objective) for objective in SERVED_OBJECTIVES}
    results |= {f"{describe(o)} float32": compare(ranks, GATE, o, torch.float32) for o in SERVED_OBJECTIVES}
    results |= {f"gate {number}": compare(ranks, gate, TEACHERS) for number, gate in enumerate(SERVED_GATES)}
    for weighting in SERVED_WEIGHTINGS:
        results[weighting.name] = compare(ranks, GATE, TEACHERS, weighting=weighting)
    if ranks.cp == 1:
        for objective in (
            TEACHERS,
            dataclasses.replace(TEACHERS, tail="bucket"),
            ObjectiveConfig("sampled_token", k=6),
        ):
            results[f"moved student, {describe(objective)}"] = compare_update(ranks.tp_group, objective, CASE)
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(results))
    ANSWERS.save()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
