"""Ranks of test_kernels.py: the loss with Triton's kernels, interpreted, against the float64 reference.

    TRITON_INTERPRET=1 torchrun … worker_kernels.py OUT_FOLDER ANSWERS

All ranks share the vocabulary. Each writes rank<r>.json: {case: {"loss": …, "hidden_gradient": …, …}} as
tests/distributed/worker_distill.py does, whose comparisons these are. Blocks and tiles are smaller than on a GPU, so
that a small vocabulary has several of both and the last ones are not full.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.config import GateConfig, ObjectiveConfig, WeightingConfig
from prune_opd.loss import products, triton_passes, vocab_parallel
from prune_opd.loss.triton_passes import TritonPasses
from tests.distributed import worker_distill
from tests.distributed.answers import ANSWERS
from tests.distributed.shards import sharded, whole
from tests.distributed.worker_distill import (
    BUCKET,
    DISCOUNTED,
    MASKED,
    compare,
    compare_buffer,
    compare_update,
    empty_shard_case,
    equal_padding_case,
    sure_case,
    tied_case,
    twin_case,
)
from tests.ending import CLASS, ending_case
from tests.loss.quick_interpreter import quicken
from tests.loss.test_bf16 import stand_in
from tests.reference import GATE, NO_WEIGHTING, OBJECTIVES, WEIGHTINGS, Case, describe, make_case
from tests.sharp import Gradients, gradients, sharp_case

SMALL = make_case((3, 0, 1, 2), seed=3)  # whose losses are no small sums of large terms
ENDING = ending_case((3, 0, 1, 2))
SHARP = sharp_case(tokens=6, hidden=16, vocab=96)
WIDE = sharp_case(tokens=6, hidden=16, vocab=1024)
FULL = ObjectiveConfig("full_vocab_jsd", k=6)

# Objectives whose passes differ → the settings.
COUNTED: dict[str, dict[str, Any]] = {
    "topk_reverse_kl": {},
    "bucket": {"tail": "bucket"},
    "priced_reverse_kl": {"name": "priced_reverse_kl"},
    "full_vocab_reverse_kl": {"name": "full_vocab_reverse_kl"},
    "full_vocab_jsd": {"name": "full_vocab_jsd"},
}

Run = Callable[[dist.ProcessGroup], dict[str, Any]]


def get_ready() -> None:
    """Small blocks and tiles; kernels for whatever is given a group, so that everything else is what it is held to."""
    for module in (vocab_parallel, triton_passes):
        module.BLOCK = 16
    triton_passes.TILE = 64
    plain_fused = Case.fused

    def fused(
        case: Case, gate: Any = GATE, objective: Any = worker_distill.OBJECTIVE, *args: Any, **options: Any
    ) -> Any:
        if options.get("tp_group") is not None:
            objective = dataclasses.replace(objective, kernels="triton")
        return plain_fused(case, gate, objective, *args, **options)

    Case.fused = fused  # type: ignore[method-assign]
    quicken()
    worker_distill.PLAIN = SMALL


def compare_sharp(
    group: dist.ProcessGroup, objective: ObjectiveConfig, weighting: WeightingConfig = NO_WEIGHTING, case: Case = SHARP
) -> dict[str, float]:
    """Gradients of a converged pair in bf16 against float64 of the same inputs, by torch's kernels on one rank."""
    expected = gradients(case, objective, weighting, torch.float64)
    shard = gradients(sharded(case, group), objective, weighting, tp_group=group)
    hidden, weight = Gradients(shard.hidden_NH, whole(shard.weight_VH, len(expected.weight_VH), group)).error(expected)
    return {"loss": 0.0, "hidden_gradient": hidden, "weight_gradient": weight, "statistics": 0.0}


def on_tensor_cores(group: dist.ProcessGroup, objective: ObjectiveConfig, case: Case = SHARP) -> dict[str, float]:
    """The same where the kernel rounds the gradient itself, as for CUDA's products in bf16. Those are stand-ins."""
    rounded: list[torch.dtype] = []

    def as_on_cuda(inputs: Tensor, dtype: torch.dtype) -> bool:
        rounded.append(inputs.dtype)
        return inputs.dtype == torch.bfloat16 and dtype == torch.float32

    products_of = {name: stand_in(name) for name in ("mm", "addmm")}
    with patch.object(products, "_on_tensor_cores", as_on_cuda), patch.multiple(torch, **products_of):
        errors = compare_sharp(group, objective, case=case)
    assert torch.bfloat16 in rounded
    return errors


IN_FP32: dict[str, Run] = {
    f"{describe(objective)}, {weighting.name} float32": lambda group, o=objective, w=weighting: compare(
        SMALL, group, objective=o, dtype=torch.float32, weighting=w
    )
    for objective in OBJECTIVES
    for weighting in (NO_WEIGHTING, *WEIGHTINGS)
}
IN_BF16: dict[str, Run] = {
    f"{describe(objective)}, {weighting.name}, sharp": lambda group, o=objective, w=weighting: compare_sharp(
        group, o, w
    )
    for i, objective in enumerate(OBJECTIVES)
    for weighting in (NO_WEIGHTING, WEIGHTINGS[i % len(WEIGHTINGS)])
}
ROUNDED: dict[str, Run] = {
    f"{describe(objective)}, tensor cores, sharp": lambda group, o=objective: on_tensor_cores(group, o)
    for objective in OBJECTIVES
    if objective.name in ("sampled_token", "local_support_matching", "full_vocab_reverse_kl", "full_vocab_jsd")
}
OTHERS: dict[str, Run] = {
    "ends of a class, tensor cores, sharp": lambda group: on_tensor_cores(group, CLASS, WIDE),
    "float64": lambda group: compare(SMALL, group),
    "float64, full vocabulary": lambda group: compare(SMALL, group, objective=FULL),
    "no gate": lambda group: compare(SMALL, group, gate=None),
    "temperature": lambda group: compare(SMALL, group, objective=ObjectiveConfig(k=6, temperature=0.6)),
    "teacher temperature": lambda group: compare(
        SMALL, group, objective=ObjectiveConfig("full_vocab_mixed_kl", k=6, temperature=0.6, teacher_temperature=1.4)
    ),
    "teacher top-p": lambda group: compare(SMALL, group, GateConfig("teacher_top_p", k=9, w_drop=0.15, top_p=0.6)),
    "few candidates": lambda group: compare(SMALL, group, dataclasses.replace(GATE, k=2), ObjectiveConfig(k=2)),
    "k wider than a shard": lambda group: compare(SMALL, group, dataclasses.replace(GATE, k=40), ObjectiveConfig(k=50)),
    "stale tokens, discounted": lambda group: compare(SMALL.stale(), group, objective=DISCOUNTED),
    "engine mismatch, masked, stale tokens": lambda group: compare(
        SMALL.stale().mismatched(), group, objective=MASKED, weighting=WEIGHTINGS[0]
    ),
    "ties across shards": lambda group: compare(tied_case(), group),
    "student is teacher": lambda group: compare(twin_case(), group),
    "a shard of padding": lambda group: compare(empty_shard_case(), group),
    "full vocabulary, a shard of padding": lambda group: compare(empty_shard_case(), group, objective=FULL),
    "price, a shard of padding": lambda group: compare(
        empty_shard_case(), group, objective=ObjectiveConfig("priced_reverse_kl", k=6)
    ),
    "equal padding": lambda group: compare(equal_padding_case(), group),
    "sure models, bucket": lambda group: compare(sure_case(), group, objective=BUCKET),
    "sure models, bucket float32": lambda group: compare(sure_case(), group, objective=BUCKET, dtype=torch.float32),
    "ends of a class": lambda group: compare(ENDING, group, objective=CLASS),
    "ends of a class, full vocabulary": lambda group: compare(
        ENDING, group, objective=dataclasses.replace(FULL, ends="class")
    ),
    "moved student": lambda group: compare_update(group, worker_distill.OBJECTIVE, SMALL),
    "moved student, full vocabulary": lambda group: compare_update(group, FULL, SMALL),
    "weight gradient in a buffer": lambda group: compare_buffer(SMALL, group, torch.float64, chunk=4),
    "no tokens": lambda group: compare(make_case(lengths=(0, 0)), group),
}


def twins(group: dist.ProcessGroup) -> dict[str, Any]:
    """Objectives, of those on the vocabulary, that teach a student that equals its teacher something."""
    found = []
    case = sharded(equal_padding_case(), group).leaves(torch.float32)
    case.teacher_hidden, case.teacher_weight = case.student_hidden.detach(), case.student_weight.detach()
    for objective in OBJECTIVES:
        case.student_hidden.grad = case.student_weight.grad = None
        if objective.name.startswith("full_vocab"):
            loss = case.fused(GATE, objective, tp_group=group)[0]
            loss.backward()
            if loss.item() or any(gradient.any() for gradient in case.gradients()):
                found.append(describe(objective))
    return {"not silent": found}


def broken(group: dist.ProcessGroup) -> dict[str, str]:
    """Every rank must raise for a logit that is not a number, and for one that is infinite."""
    found = {}
    for name, value in (("nan", torch.nan), ("infinite", torch.inf)):
        case = dataclasses.replace(SMALL, student_hidden=SMALL.student_hidden.clone())
        case.student_hidden[4, 0] = value
        try:
            sharded(case, group).fused(chunk=7, tp_group=group)
        except ValueError as reason:
            found[name] = str(reason)
    return found


def cases(ranks: int) -> dict[str, Run]:
    """On one rank every weighting is tried with every objective in fp32.

    In bf16, which differs in nothing but the products, each objective has one weighting, and each weighting every fifth
    objective. On more ranks weightings are tried with two objectives, and not in bf16.
    """
    if ranks == 1:
        return {**IN_FP32, **IN_BF16, **ROUNDED, **OTHERS}
    with_all = (describe(worker_distill.OBJECTIVE), "full_vocab_reverse_kl")
    in_fp32 = {
        f"{name}, {kind} float32": IN_FP32[f"{name}, {kind} float32"]
        for name in map(describe, OBJECTIVES)
        for kind in ("none", *(weighting.name for weighting in WEIGHTINGS if name in with_all))
    }
    in_bf16 = {name: run for name, run in IN_BF16.items() if name.endswith(", none, sharp")}
    return {**in_fp32, **in_bf16, **ROUNDED, **OTHERS}


def touched(group: dist.ProcessGroup) -> dict[str, Any]:
    """Objective → how often the kernels read the student's and the teacher's logits, and write the student's."""
    return {name: accesses(group, ObjectiveConfig(k=6, **settings)) for name, settings in COUNTED.items()}


def accesses(group: dist.ProcessGroup, objective: ObjectiveConfig) -> list[float]:
    """Every element that a kernel asks the interpreter for, by its address."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    begin: list[int] = []
    size, counted = 0, {"student read": 0, "teacher read": 0, "student written": 0, "teacher written": 0}

    def note(addresses: Any, mask: Any, what: str) -> None:
        at = addresses.data[mask.data.astype(bool)].astype("int64") - begin[-1]
        counted[f"student {what}"] += int(((at >= 0) & (at < size)).sum())
        counted[f"teacher {what}"] += int(((at >= size) & (at < 2 * size)).sum())

    plain_load, plain_store, plain_init = builder.create_masked_load, builder.create_masked_store, TritonPasses.__init__

    def load(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        note(pointers, mask, "read")
        return plain_load(self, pointers, mask, *more)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        note(pointers, mask, "written")
        return plain_store(self, pointers, value, mask, *more)

    def init(self: Any, *given: Any) -> None:
        nonlocal size
        plain_init(self, *given)
        begin.append(self.logits_2NW.data_ptr())
        size = self.logits_2NW.stride(0) * self.logits_2NW.element_size()

    replaced = {"create_masked_load": load, "create_masked_store": store}
    with patch.multiple(builder, **replaced), patch.object(TritonPasses, "__init__", init):
        case = sharded(equal_padding_case(), group).leaves(torch.float32)
        case.fused(GATE, objective, chunk=len(case.sampled), tp_group=group)
    return [count * 4 / size for count in counted.values()]


def main(folder: Path, answers: Path) -> None:
    dist.init_process_group("gloo")
    ANSWERS.open(answers)
    get_ready()
    group = dist.group.WORLD
    assert group is not None
    runs = {**cases(dist.get_world_size()), "twins": twins, "broken": broken, "touched": touched}
    results = {name: run(group) for name, run in runs.items()}
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    ANSWERS.save()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
