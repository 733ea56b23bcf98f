"""Ranks of test_context_loss.py: responses shared among context-parallel ranks, against the reference of the whole.

    torchrun … worker_context_loss.py OUT_FOLDER TP CP ANSWERS

Neighbouring ranks hold vocabulary shards of the same tokens; context-parallel ranks are TP apart, as megatron has them.
Writes rank<r>.json like worker_distill.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.config import GateConfig, ObjectiveConfig, WeightingConfig
from prune_opd.loss.context import ContextShard
from tests.distributed.answers import ANSWERS, Answer, of_reference, of_update
from tests.distributed.worker_distill import BUCKET, DISCOUNTED, error, is_aligned, sharded, statistics_error, whole
from tests.ending import CLASS, ending_case
from tests.reference import GATE, NO_WEIGHTING, OBJECTIVE, WEIGHTINGS, Case, make_case

LONG = make_case(lengths=(9, 0, 1, 14, 0, 30))
ENDING = ending_case(lengths=(9, 0, 1, 14, 0, 30))
CHANGE_POINT = dataclasses.replace(GATE, metric="change_point", alarm=3.0)
SHORT = make_case(lengths=(1,))  # leaves all ranks but one without a token


def zigzag(offsets: list[int], rank: int, ranks: int) -> Tensor:
    """Places of a rank's tokens: of each response the rank-th piece from the front and from the back, of 2 · ranks."""
    places: list[int] = []
    for begin, end in pairwise(offsets):
        cuts = [begin + (end - begin) * i // (2 * ranks) for i in range(2 * ranks + 1)]
        for piece in (rank, 2 * ranks - 1 - rank):
            places += range(cuts[piece], cuts[piece + 1])
    return torch.tensor(places, dtype=torch.int64)


class Ranks:
    """This rank's groups."""

    def __init__(self, tp: int, cp: int) -> None:
        self.rank = dist.get_rank()
        tp_groups = [dist.new_group(list(range(first, first + tp))) for first in range(0, tp * cp, tp)]
        cp_groups = [dist.new_group(list(range(first, tp * cp, tp))) for first in range(tp)]
        self.tp_group, self.cp_group = tp_groups[self.rank // tp], cp_groups[self.rank % tp]
        self.cp_rank, self.cp = self.rank // tp, cp

    def part(self, case: Case, dtype: torch.dtype) -> tuple[Case, ContextShard]:
        index_N = zigzag(case.offsets, self.cp_rank, self.cp)
        mine = dataclasses.replace(
            sharded(case, self.tp_group),
            student_hidden=case.student_hidden[index_N],
            teacher_hidden=case.teacher_hidden[index_N],
            sampled=case.sampled[index_N],
            stale_logp=None if case.stale_logp is None else case.stale_logp[index_N],
            advantage=None if case.advantage is None else case.advantage[index_N],
        )
        return mine.leaves(dtype), ContextShard(index_N, len(case.sampled), self.cp_group)

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        dist.all_reduce(total, group=self.cp_group)
        return total

    def errors(self, loss: Tensor, mine: Case, context: ContextShard, answer: Answer) -> dict:
        """The loss has had its backward."""
        hidden, weight = mine.gradients()
        rows = len(answer.weight_gradient)
        return {
            "loss": error(self.sum(loss), answer.loss),
            "hidden_gradient": error(hidden, answer.hidden_gradient[context.index_N]),
            "weight_gradient": error(whole(self.sum(weight), rows, self.tp_group), answer.weight_gradient),
        }


def compare(
    ranks: Ranks,
    gate: GateConfig | None = GATE,
    objective: ObjectiveConfig = OBJECTIVE,
    weighting: WeightingConfig = NO_WEIGHTING,
    dtype: torch.dtype = torch.float64,
    case: Case = LONG,
) -> dict[str, float]:
    rounded = case.leaves(dtype)
    answer, reference = of_reference(rounded, gate, objective, weighting)
    mine, context = ranks.part(rounded, dtype)
    loss, count, stats = mine.fused(
        gate, objective, chunk=7, tp_group=ranks.tp_group, weighting=weighting, context=context
    )
    loss.backward()
    same = (
        count == len(mine.sampled)
        and stats.event_N.tolist() == reference.event
        and stats.reliable_length_B.tolist() == reference.reliable_length
        and stats.length_B.tolist() == reference.length
    )
    if case.stale_logp is not None:  # the statistics are those of all ranks' tokens
        alone = rounded.fused(gate, objective, weighting=weighting)[2]
        assert stats.stale_ratio_N is not None and alone.stale_ratio_N is not None
        same &= bool(torch.isclose(stats.stale_ratio_N, alone.stale_ratio_N, rtol=1e-9, equal_nan=True).all())
        same &= torch.equal(stats.stale_clipped_N, alone.stale_clipped_N)
    if case.terminal_ids:
        alone = rounded.fused(gate, objective, weighting=weighting)[2]
        assert stats.ends_5M is not None and alone.ends_5M is not None
        same &= torch.allclose(stats.ends_5M, alone.ends_5M, rtol=1e-9)
    errors = ranks.errors(loss, mine, context, answer)
    aligned = is_aligned(mine, ranks.tp_group, objective, weighting)
    return {**errors, "statistics": statistics_error(stats, reference, aligned) if same else math.inf}


def compare_update(ranks: Ranks, objective: ObjectiveConfig = OBJECTIVE, case: Case = LONG) -> dict[str, float]:
    """A second update with the same tokens: weights and rewards stay those of the policy that sampled them."""
    before, context = ranks.part(case, torch.float64)
    kept = before.fused(objective=objective, policy="keep", chunk=7, tp_group=ranks.tp_group, context=context)[2]
    moved = case.moved()
    answer = of_update(case, moved, GATE, objective, NO_WEIGHTING)
    mine, context = ranks.part(moved, torch.float64)
    loss, _, stats = mine.fused(
        objective=objective, policy=kept.policy, chunk=5, tp_group=ranks.tp_group, context=context
    )
    loss.backward()
    errors = ranks.errors(loss, mine, context, answer)
    whole_kept = case.fused(objective=objective, policy="keep")[2]
    alone = moved.fused(objective=objective, policy=whole_kept.policy)[2]
    wrong = [error(stats.weight_N, kept.weight_N), error(stats.overlap_N, alone.overlap_N)]
    assert (stats.ratio_N is None) == (alone.ratio_N is None) == (objective.name == "full_vocab_jsd")
    if alone.ratio_N is not None:
        wrong += [error(stats.ratio_N, alone.ratio_N), error(stats.clipped_N, alone.clipped_N)]
    same = torch.equal(stats.event_N, alone.event_N) and torch.equal(stats.reliable_length_B, alone.reliable_length_B)
    return {**errors, "statistics": max(wrong) if same else math.inf}


CASES: dict[str, Callable[[Ranks], dict[str, float]]] = {
    "float64": compare,
    "float32": lambda ranks: compare(ranks, dtype=torch.float32),
    "no gate": lambda ranks: compare(ranks, gate=None),
    "mean weight": lambda ranks: compare(ranks, dataclasses.replace(GATE, weight_normalisation="mean")),
    "teacher top-p": lambda ranks: compare(ranks, GateConfig("teacher_top_p", k=9, w_drop=0.15, top_p=0.6)),
    "full vocabulary": lambda ranks: compare(ranks, objective=ObjectiveConfig("full_vocab_jsd", k=6)),
    "bucket": lambda ranks: compare(ranks, objective=BUCKET),
    "discounted": lambda ranks: compare(ranks, objective=DISCOUNTED),
    "discounted, ranks without a token": lambda ranks: compare(ranks, objective=DISCOUNTED, case=SHORT),
    "moved student, discounted": lambda ranks: compare_update(ranks, DISCOUNTED),
    "change point": lambda ranks: compare(ranks, CHANGE_POINT),
    "change point, ranks without a token": lambda ranks: compare(ranks, CHANGE_POINT, case=SHORT),
    "reward": lambda ranks: compare(ranks, case=LONG.rewarded()),
    "reward, stale tokens": lambda ranks: compare(ranks, case=LONG.stale().rewarded()),
    "reward, moved student": lambda ranks: compare_update(ranks, case=LONG.rewarded()),
    "reward, ranks without a token": lambda ranks: compare(ranks, case=SHORT.rewarded()),
    "stale tokens": lambda ranks: compare(ranks, case=LONG.stale()),
    "stale tokens, ranks without a token": lambda ranks: compare(ranks, case=SHORT.stale()),
    "ranks without a token": lambda ranks: compare(ranks, case=SHORT),
    **{
        f"{weighting.name}, {'gate' if gate else 'no gate'}": lambda ranks, w=weighting, g=gate: compare(
            ranks, g, weighting=w
        )
        for weighting in WEIGHTINGS
        for gate in (GATE, None)
    },
    "ends": lambda ranks: compare(ranks, objective=CLASS, case=ENDING),
    "ends, stale tokens": lambda ranks: compare(ranks, objective=CLASS, case=ENDING.stale()),
    "ends, discounted": lambda ranks: compare(
        ranks, objective=dataclasses.replace(DISCOUNTED, ends="class"), case=ENDING
    ),
    "ends, full vocabulary": lambda ranks: compare(
        ranks, objective=ObjectiveConfig("full_vocab_jsd", k=6, ends="class"), case=ENDING
    ),
    "ends, moved student": lambda ranks: compare_update(ranks, CLASS, ENDING),
    "moved student": compare_update,
    "moved student, bucket": lambda ranks: compare_update(ranks, BUCKET),
    "moved student, full vocabulary": lambda ranks: compare_update(ranks, ObjectiveConfig("full_vocab_jsd", k=6)),
    "moved student, ranks without a token": lambda ranks: compare_update(ranks, case=SHORT),
}


def broken_hidden(ranks: Ranks) -> dict[str, str]:
    """Every rank must raise, also those whose own tokens are sound."""
    mine, context = ranks.part(LONG, torch.float64)
    if ranks.cp_rank == 0:
        with torch.no_grad():
            mine.student_hidden[2, 0] = math.nan
    try:
        mine.fused(chunk=7, tp_group=ranks.tp_group, context=context)
    except ValueError as reason:
        return {"raised": str(reason)}
    return {"raised": ""}


def wrong_index(ranks: Ranks) -> dict[str, str]:
    mine, context = ranks.part(LONG, torch.float64)
    raised = {}
    for name, wrong in (
        ("index", dataclasses.replace(context, index_N=context.index_N[1:])),
        ("tokens", dataclasses.replace(context, tokens=context.tokens + 1)),
    ):
        try:
            mine.fused(tp_group=ranks.tp_group, context=wrong)
        except ValueError as reason:
            raised[name] = str(reason)
    return raised


def main(folder: Path, tp: int, cp: int, answers: Path) -> None:
    dist.init_process_group("gloo")
    ANSWERS.open(answers)
    ranks = Ranks(tp, cp)
    results: dict[str, dict] = {name: run(ranks) for name, run in CASES.items()}
    for other in (broken_hidden, wrong_index):
        results[other.__name__] = other(ranks)
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(results))
    ANSWERS.save()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
