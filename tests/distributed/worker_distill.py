"""Ranks of test_distill_tp.py: run the cases on vocabulary shards and write how far each is from the reference.

    torchrun … worker_distill.py OUT_FOLDER TP ANSWERS

Every rank makes the same whole inputs from the same seed, keeps its shard of both weights and writes rank<r>.json:
{case: {"loss": …, "hidden_gradient": …, "weight_gradient": …, "statistics": …}}, largest errors relative to the largest
entry of the float64 reference, whose answers are in the file ANSWERS (`answers.py`). Groups of TP neighbouring ranks
work side by side.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.config import GateConfig, ObjectiveConfig, WeightingConfig
from prune_opd.loss import GateStats
from prune_opd.loss.vocab_parallel import VocabShard, local_gather, log_normaliser, sum_together, topk
from tests.distributed.answers import ANSWERS, Answer, of_reference, of_update, seen_alone
from tests.distributed.bf16_cases import BF16_CASES, is_tried
from tests.distributed.shards import error, is_aligned, sharded, whole
from tests.ending import AS_CLASS, CLASS, ending_case
from tests.reference import (
    GATE,
    NO_WEIGHTING,
    OBJECTIVE,
    OBJECTIVES,
    VOCAB,
    WEIGHTINGS,
    Case,
    Reference,
    describe,
    make_case,
)
from tests.reference_token import top_ids

PLAIN = make_case()
ENDING = ending_case()
BUCKET = dataclasses.replace(OBJECTIVE, tail="bucket")
DISCOUNTED = ObjectiveConfig("sampled_token", k=6, discount=0.9)
TRUNCATED = dataclasses.replace(OBJECTIVE, mismatch="truncated")
MASKED = ObjectiveConfig("sampled_token", mismatch="masked")


def gradient_errors(loss: Tensor, shard: Case, answer: Answer, group: dist.ProcessGroup) -> dict:
    """The comparison itself: value and both gradients of a loss that has had its backward."""
    hidden, weight = shard.gradients()
    return {
        "loss": error(loss.detach(), answer.loss),
        "hidden_gradient": error(hidden, answer.hidden_gradient),
        "weight_gradient": error(whole(weight, len(answer.weight_gradient), group), answer.weight_gradient),
    }


def statistics_error(stats: GateStats, reference: Reference, aligned: bool) -> float:
    """The largest of the per-token statistics."""
    expected = {
        "overlap_N": reference.overlap,
        "reliability_N": reference.reliability,
        "weight_N": reference.weight,
        "sampled_logp_N": reference.sampled_logp,
        "divergence_N": reference.divergence,
        **reference.outside,
    }
    if not aligned:  # no rank has the same ids of both models, and none may pretend to know
        assert stats.reverse_kl_N.isnan().all()
        expected.pop("reverse_kl_N", None)
    return max(
        error(getattr(stats, name), torch.tensor(values, dtype=torch.float64)) for name, values in expected.items()
    )


def compare(
    case: Case,
    group: dist.ProcessGroup,
    gate: GateConfig | None = GATE,
    objective: ObjectiveConfig = OBJECTIVE,
    dtype: torch.dtype = torch.float64,
    chunk: int = 7,
    weighting: WeightingConfig = NO_WEIGHTING,
) -> dict[str, float]:
    """The fused loss on this rank's shard against the reference on the whole vocabulary, and against a single rank."""
    rounded = case.leaves(dtype)
    answer, reference = of_reference(rounded, gate, objective, weighting)
    shard = sharded(rounded, group).leaves(dtype)
    loss, _, stats = shard.fused(gate, objective, chunk=chunk, tp_group=group, weighting=weighting)
    (3 * loss if case.sampled.numel() else loss).backward()
    events, reliable_length, overlap_N = ANSWERS.find(
        ("alone", rounded, gate, objective, weighting, chunk),
        lambda: seen_alone(rounded.fused(gate, objective, chunk=chunk, weighting=weighting)[2]),
    )
    same = (
        stats.event_N.tolist() == reference.event == events
        and stats.reliable_length_B.tolist() == reference.reliable_length == reliable_length
        and torch.equal(stats.overlap_N, overlap_N)
    )
    errors = gradient_errors(loss, shard, answer.times(3), group)
    aligned = is_aligned(shard, group, objective, weighting, gate)
    return {**errors, "statistics": statistics_error(stats, reference, aligned) if same else math.inf}


def compare_stale(case: Case, group: dist.ProcessGroup) -> dict[str, float]:
    """As `compare`; and what the statistics say of the ratio, which the reference has in its weights only."""
    assert case.stale_logp is not None
    result = compare(case, group)
    stats = sharded(case, group).fused(tp_group=group, chunk=7)[2]
    expected_N = (stats.sampled_logp_N - case.stale_logp).exp()
    known_N = ~case.stale_logp.isnan()
    assert stats.stale_ratio_N is not None and stats.stale_clipped_N is not None
    assert torch.equal(stats.stale_ratio_N.isnan(), ~known_N) and 0 < known_N.sum() < len(known_N)
    beyond_N = (expected_N > 1 + OBJECTIVE.clip) | (expected_N < 1 - OBJECTIVE.clip)
    assert torch.equal(stats.stale_clipped_N, beyond_N) and 0 < beyond_N.sum() < known_N.sum()
    wrong = error(stats.stale_ratio_N[known_N], expected_N[known_N])
    return {**result, "statistics": max(result["statistics"], wrong)}


def compare_buffer(case: Case, group: dist.ProcessGroup, dtype: torch.dtype, chunk: int) -> dict[str, float]:
    """The weight's gradient added to a buffer on each rank's shard, in two micro-batches, against the reference."""
    rounded = case.leaves(dtype)
    answer, _ = of_reference(rounded, GATE, OBJECTIVE, NO_WEIGHTING)
    shard = sharded(rounded, group).leaves(dtype)
    buffer = torch.zeros_like(shard.student_weight, requires_grad=False)
    total = torch.zeros((), dtype=dtype)
    cut = len(case.offsets) // 2
    for first, last in ((0, cut), (cut, len(case.offsets) - 1)):
        begin, end = case.offsets[first], case.offsets[last]
        part = dataclasses.replace(
            shard,
            student_hidden=shard.student_hidden[begin:end],
            teacher_hidden=shard.teacher_hidden[begin:end],
            sampled=shard.sampled[begin:end],
            offsets=[offset - begin for offset in case.offsets[first : last + 1]],
        )
        loss = part.fused(chunk=chunk, tp_group=group, weight_grad=buffer)[0]
        loss.backward()
        total += loss.detach()
    assert shard.student_weight.grad is None
    shard.student_weight.grad = buffer
    return {**gradient_errors(total, shard, answer, group), "statistics": 0.0}


def compare_update(group: dist.ProcessGroup, objective: ObjectiveConfig, case: Case = PLAIN) -> dict[str, float]:
    """A student that has moved since its batch was sampled, on shards, against the reference on the whole."""
    before = sharded(case, group).fused(objective=objective, policy="keep", chunk=7, tp_group=group)[2]
    moved = case.moved().leaves(torch.float64)
    answer = of_update(case, moved, GATE, objective, NO_WEIGHTING)
    shard = sharded(moved, group).leaves(torch.float64)
    loss, _, stats = shard.fused(objective=objective, policy=before.policy, chunk=5, tp_group=group)
    loss.backward()
    errors = gradient_errors(loss, shard, answer, group)
    return {**errors, "statistics": error(stats.weight_N, before.weight_N)}


# ---------------------------------------------------------------------------------------------------- the cases

FULL_VOCABULARY = ObjectiveConfig("full_vocab_reverse_kl", k=6)


def tied_case() -> Case:
    """Small whole numbers: logits tie within a shard and across shards; one token's are all equal."""
    case = make_case(seed=3)
    signs = {name: getattr(case, name).sign() for name in ("student_hidden", "student_weight", "teacher_hidden")}
    signs["student_hidden"][3] = 0
    return dataclasses.replace(case, **signs, teacher_weight=case.teacher_weight.sign())


def twin_case() -> Case:
    return dataclasses.replace(PLAIN, teacher_hidden=PLAIN.student_hidden, teacher_weight=PLAIN.student_weight)


def equal_padding_case() -> Case:
    """Both models' shards start at the same ids, as with one padding rule and one vocabulary."""
    return dataclasses.replace(PLAIN, teacher_weight=PLAIN.teacher_weight[: len(PLAIN.student_weight)])


def sure_case() -> Case:
    """Models so sure that fp32 has nothing left of 1 − p: the tail must not come from a difference."""
    case = equal_padding_case()
    return dataclasses.replace(case, student_hidden=6 * case.student_hidden, teacher_hidden=7 * case.teacher_hidden)


def empty_shard_case() -> Case:
    """A vocabulary that ends within the first shard, so that the others are all padding."""
    small = 15
    return dataclasses.replace(PLAIN, vocab_size=small, sampled=PLAIN.sampled % small)


def large_vocabulary_case() -> Case:
    """Qwen's 151936 ids, for which the teacher's weight has 152064 rows: its shards start elsewhere."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(151936, 4, generator=generator), torch.randn(152064, 5, generator=generator)
    teacher[:151936, :4] = student
    hidden = torch.randn(4, 4, generator=generator) * 2
    return Case(
        student_hidden=hidden.double(),
        student_weight=student.double(),
        teacher_hidden=torch.cat([hidden, torch.ones(4, 1)], 1).double(),
        teacher_weight=teacher.double(),
        sampled=torch.tensor([0, 151935, 37984, 75968]),
        offsets=[0, 1, 4],
        vocab_size=151936,
    )


def of_every_kind() -> dict[str, Callable[[dist.ProcessGroup], dict[str, float]]]:
    """Every objective × support × weight in both dtypes and chunks that do and do not divide; every weighting."""
    cases: dict[str, Callable[[dist.ProcessGroup], dict[str, float]]] = {}
    for objective in OBJECTIVES:
        name = describe(objective)
        cases[name] = lambda group, o=objective: compare(PLAIN, group, objective=o)
        cases[f"{name} float32"] = lambda group, o=objective: compare(PLAIN, group, GATE, o, torch.float32, chunk=8)
    for weighting in WEIGHTINGS:
        for objective in (OBJECTIVE, ObjectiveConfig("full_vocab_reverse_kl", k=6)):
            name = f"{objective.name} {weighting.name}"
            cases[name] = lambda group, w=weighting, o=objective: compare(PLAIN, group, GATE, o, weighting=w)
    return cases


def of_ends() -> dict[str, Callable[[dist.ProcessGroup], dict[str, float]]]:
    """Terminal ids on several shards as one outcome: every objective, and every one of a student that has moved."""
    cases: dict[str, Callable[[dist.ProcessGroup], dict[str, float]]] = {}
    for objective in AS_CLASS:
        name = describe(objective)
        cases[name] = lambda group, o=objective: compare(ENDING, group, objective=o)
        cases[f"moved student, {name}"] = lambda group, o=objective: compare_update(group, o, ENDING)
    for weighting in WEIGHTINGS:
        cases[f"ends, {weighting.name}"] = lambda group, w=weighting: compare(ENDING, group, GATE, CLASS, weighting=w)
    cases["ends, stale tokens"] = lambda group: compare(ENDING.stale(), group, objective=CLASS)
    return cases


CASES: dict[str, Callable[[dist.ProcessGroup], dict[str, float]]] = {
    "float64": lambda group: compare(PLAIN, group),
    "float64 in one chunk": lambda group: compare(PLAIN, group, chunk=1000),
    "float32": lambda group: compare(PLAIN, group, dtype=torch.float32),
    "bfloat16": lambda group: compare(PLAIN, group, gate=None, dtype=torch.bfloat16),
    "no gate": lambda group: compare(PLAIN, group, gate=None),
    "temperature": lambda group: compare(PLAIN, group, objective=ObjectiveConfig(k=6, temperature=0.6)),
    "teacher temperature": lambda group: compare(
        PLAIN, group, objective=ObjectiveConfig("full_vocab_mixed_kl", k=6, temperature=0.6, teacher_temperature=1.4)
    ),
    "price, a shard of padding": lambda group: compare(
        empty_shard_case(), group, objective=ObjectiveConfig("priced_reverse_kl", k=6)
    ),
    "stale tokens, discounted": lambda group: compare(PLAIN.stale(), group, objective=DISCOUNTED),
    "mean weight": lambda group: compare(PLAIN, group, dataclasses.replace(GATE, weight_normalisation="mean")),
    "teacher top-p": lambda group: compare(PLAIN, group, GateConfig("teacher_top_p", k=9, w_drop=0.15, top_p=0.6)),
    "k wider than a shard": lambda group: compare(PLAIN, group, dataclasses.replace(GATE, k=40), ObjectiveConfig(k=50)),
    "stale tokens": lambda group: compare_stale(PLAIN.stale(), group),
    "engine mismatch, truncated": lambda group: compare(PLAIN.mismatched(), group, objective=TRUNCATED),
    "engine mismatch, masked, stale tokens": lambda group: compare(
        PLAIN.stale().mismatched(), group, objective=MASKED, weighting=WEIGHTINGS[0]
    ),
    "stale tokens, entropy_aware": lambda group: compare(PLAIN.stale(), group, weighting=WEIGHTINGS[0]),
    "ties across shards": lambda group: compare(tied_case(), group),
    "student is teacher": lambda group: compare(twin_case(), group),
    "a shard of padding": lambda group: compare(empty_shard_case(), group),
    "full vocabulary, bfloat16": lambda group: compare(
        PLAIN, group, gate=None, objective=ObjectiveConfig("full_vocab_jsd", k=6), dtype=torch.bfloat16
    ),
    "full vocabulary, a shard of padding": lambda group: compare(
        empty_shard_case(), group, objective=ObjectiveConfig("full_vocab_jsd", k=6)
    ),
    "equal padding": lambda group: compare(equal_padding_case(), group),
    "equal padding, float32": lambda group: compare(equal_padding_case(), group, dtype=torch.float32),
    "sure models, bucket": lambda group: compare(sure_case(), group, objective=BUCKET),
    "sure models, bucket float32": lambda group: compare(sure_case(), group, objective=BUCKET, dtype=torch.float32),
    "bucket without a rest": lambda group: compare(PLAIN, group, objective=dataclasses.replace(BUCKET, k=VOCAB)),
    "acceptance": lambda group: compare(PLAIN, group, dataclasses.replace(GATE, metric="acceptance")),
    "shared mass": lambda group: compare(PLAIN, group, dataclasses.replace(GATE, metric="shared_mass")),
    "KL agreement": lambda group: compare(
        PLAIN, group, dataclasses.replace(GATE, metric="kl_agreement", low_tokens=4, threshold=1.0)
    ),
    "gate without memory, tropd": lambda group: compare(
        PLAIN, group, dataclasses.replace(GATE, memory=False), weighting=WEIGHTINGS[4]
    ),
    "change point": lambda group: compare(PLAIN, group, dataclasses.replace(GATE, metric="change_point", alarm=3.0)),
    "151936 ids and 152064 rows": lambda group: compare(
        large_vocabulary_case(), group, objective=ObjectiveConfig("full_vocab_jsd"), chunk=3
    ),
    "reward, full vocabulary": lambda group: compare(PLAIN.rewarded(), group, objective=FULL_VOCABULARY),
    "reward, stale tokens": lambda group: compare(PLAIN.stale().rewarded(), group, objective=FULL_VOCABULARY),
    "reward, bfloat16": lambda group: compare(PLAIN.rewarded(), group, None, FULL_VOCABULARY, torch.bfloat16),
    "reward, moved student": lambda group: compare_update(group, FULL_VOCABULARY, PLAIN.rewarded()),
    **of_every_kind(),
    **of_ends(),
    "moved student": lambda group: compare_update(group, OBJECTIVE),
    "moved student, discounted": lambda group: compare_update(group, DISCOUNTED),
    "moved student, union": lambda group: compare_update(group, dataclasses.replace(OBJECTIVE, support="union")),
    "moved student, bucket": lambda group: compare_update(group, BUCKET),
    "moved student, full vocabulary": lambda group: compare_update(group, ObjectiveConfig("full_vocab_jsd", k=6)),
    "weight gradient in a buffer": lambda group: compare_buffer(PLAIN, group, torch.float64, chunk=4),
    "weight gradient in a buffer, float32": lambda group: compare_buffer(PLAIN, group, torch.float32, chunk=7),
    **BF16_CASES,
    "no tokens": lambda group: compare(make_case(lengths=(0, 0)), group),
}


def cases(ranks: int, tp: int) -> dict[str, Callable[[dist.ProcessGroup], dict[str, float]]]:
    return {name: run for name, run in CASES.items() if is_tried(name, ranks, tp)}


def raw_all_reduce_loss(case: Case, group: dist.ProcessGroup) -> Tensor:
    """The usual mistake: autograd through each rank's own columns, with the sums over ranks taken by dist.all_reduce.

    The value is right on every rank. But no rank hears of the others' columns in its hidden states' gradient.
    """
    shard = VocabShard(len(case.student_weight), case.vocab_size, group)
    logits_NV = case.student_hidden @ case.student_weight.T
    logits_NV = logits_NV.masked_fill(torch.arange(shard.rows) >= shard.valid, -math.inf)
    teacher_NV = case.teacher_hidden @ case.teacher_weight.T
    teacher_shard = VocabShard(len(case.teacher_weight), case.vocab_size, group)
    teacher_NV[:, teacher_shard.valid :] = -math.inf
    top = topk(logits_NV.detach(), OBJECTIVE.k, shard)
    maximum_N1 = top.values_NK[:, :1]
    total_N1 = (logits_NV - maximum_N1).exp().sum(-1, keepdim=True)
    dist.all_reduce(total_N1, group=group)
    at_NK = local_gather(logits_NV, top.ids_NK, shard)
    dist.all_reduce(at_NK, group=group)
    logp_NK = at_NK - maximum_N1 - total_N1.log()
    (teacher_at_NK,) = sum_together([local_gather(teacher_NV, top.ids_NK, teacher_shard)], group)
    logq_NK = teacher_at_NK - log_normaliser(teacher_NV, teacher_shard)[:, None]
    reward_NK = -(logp_NK.softmax(-1) * (logp_NK - logq_NK)).detach()
    return -(reward_NK * logp_NK).sum()


def raw_all_reduce(group: dist.ProcessGroup) -> dict[str, float]:
    """The same comparison, of the wrong implementation."""
    answer, _ = of_reference(PLAIN, None, OBJECTIVE, NO_WEIGHTING)
    shard = sharded(PLAIN, group).leaves(torch.float64)
    loss = raw_all_reduce_loss(shard, group)
    loss.backward()
    return gradient_errors(loss, shard, answer, group)


def top_k_of_ties(group: dist.ProcessGroup) -> dict[str, float]:
    """Entries of a top-k over shards that are not what a plain sort by (value, id) gives."""
    generator = torch.Generator().manual_seed(0)
    rows = 50
    whole_NV = torch.cat(
        [torch.randint(high, (6, rows * dist.get_world_size(group)), generator=generator) for high in (1, 3, 40)]
    ).float()
    shard = VocabShard(rows, whole_NV.shape[1], group)
    local_NV = whole_NV[:, shard.first : shard.first + rows].contiguous()
    wrong = 0
    for k in (1, 16, 60):
        ids_NK = topk(local_NV, k, shard).ids_NK
        wrong += sum(ids.tolist() != top_ids(row, k) for row, ids in zip(whole_NV, ids_NK, strict=True))
    return {"wrong": float(wrong)}


def broken_hidden(group: dist.ProcessGroup) -> dict[str, str]:
    """Every rank must raise: one that goes on alone would wait in its next collective for ever."""
    hidden = PLAIN.student_hidden.clone()
    hidden[20, 0] = math.nan
    try:
        sharded(dataclasses.replace(PLAIN, student_hidden=hidden), group).fused(chunk=7, tp_group=group)
    except ValueError as reason:
        return {"raised": str(reason)}
    return {"raised": ""}


def too_few_rows(group: dist.ProcessGroup) -> dict[str, str]:
    case = sharded(PLAIN, group)
    try:
        dataclasses.replace(case, student_weight=case.student_weight[: VOCAB // 4 - 1]).fused(tp_group=group)
    except Exception as reason:
        return {"raised": f"{type(reason).__name__}: {reason}"}
    return {"raised": ""}


def main(folder: Path, tensor_parallel: int, answers: Path) -> None:
    dist.init_process_group("gloo")
    ANSWERS.open(answers)
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group(list(range(first, first + tensor_parallel))) for first in range(0, world, tensor_parallel)]
    group = groups[rank // tensor_parallel]
    results: dict[str, dict] = {name: run(group) for name, run in cases(world, tensor_parallel).items()}
    for other in (raw_all_reduce, top_k_of_ties, broken_hidden, too_few_rows):
        results[other.__name__] = other(group)
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    ANSWERS.save()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
