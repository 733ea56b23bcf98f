"""Ranks of test_several_teachers.py: steps with two teachers on made-up rollouts, in one layout after the other.

    torchrun … worker_several_teachers.py MODELS OUT

On one rank: the references, each of which leaves its student in OUT/<name> and the gradient of its first step in
OUT/<name>.gradient. On two: every case against its reference. Writes OUT/<ranks>.json from rank 0.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prune_opd import platform
from prune_opd.config import (
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TeacherConfig,
    TeacherLayout,
)
from prune_opd.rollout.batch import Response, Rollouts
from tests.distributed.tiny_run import OPTIMIZER, build_run, made_up_rollouts, train_config, train_step

BUDGET = 48  # tokens: several micro-batches on every rank
STEPS = 3
WEIGHT = 0.5  # of teacher b
OTHER = ObjectiveConfig("sampled_token", k=8)  # of teacher b
# Whose rows they are, by row of the batch.
MIXED, FEW = "abbaaba", "aaaabaa"
PLAIN = dataclasses.replace(OPTIMIZER, clip_grad=0.0)  # the gradient stays as it was formed

# Case → student's layout, both teachers' layouts, whose rows.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "DP2 | TP1, TP2": ({"tensor": 1}, {"tensor": 1}, {"tensor": 2}, MIXED),
    "TP2+SP | TP2, PP2": ({"tensor": 2, "sequence_parallel": True}, {}, {"tensor": 1, "pipeline": 2}, MIXED),
    "PP2 | TP2, TP1": ({"tensor": 1, "pipeline": 2}, {"tensor": 2, "pipeline": 1}, {"pipeline": 1}, MIXED),
    "few DP2 | TP2, TP1": ({"tensor": 1}, {"tensor": 2}, {"tensor": 1}, FEW),
    "updates DP2 | TP2, TP1": ({"tensor": 1}, {"tensor": 2}, {"tensor": 1}, MIXED),
    "bf16 TP2 | TP1, TP2": ({"tensor": 2}, {"tensor": 1}, {"tensor": 2}, MIXED),
}
REFERENCES = {"mixed": MIXED, "few": FEW, "updates": MIXED, "bf16": MIXED}


def reference_of(case: str) -> str:
    return next((name for name in REFERENCES if case.startswith(name)), "mixed")


def config_of(models: Path, reference: str, parallel: ParallelConfig, a: dict[str, Any], b: dict[str, Any]) -> Any:
    """Two teachers. Their windows begin alike, and each moves by its own rows."""
    changes: dict[str, Any] = {"precision": PrecisionConfig(params="bf16"), "gate": None} if reference == "bf16" else {}
    if changes:  # no gate, no window of the gate's
        base = train_config(models, 1).horizon
        changes["horizon"] = dataclasses.replace(base, strategy="full")
    optimizer: OptimizerConfig = dataclasses.replace(PLAIN, updates_per_batch=2 if reference == "updates" else 1)
    return train_config(
        models,
        1,
        teacher="",
        teachers={
            "a": TeacherConfig(str(models / "teacher"), ("ledger",), parallel=TeacherLayout(**a)),
            "b": TeacherConfig(str(models / "other"), weight=WEIGHT, objective=OTHER, parallel=TeacherLayout(**b)),
        },
        parallel=parallel,
        optimizer=optimizer,
        **changes,
    )


def rollouts_of(number: int, whose: str, limits: dict[str, int]) -> Rollouts:
    """Responses that end where their teacher's horizon is: what a controller decides shows in the next loss."""
    drawn = made_up_rollouts(number)
    prompts = tuple(dataclasses.replace(p, teacher=name) for p, name in zip(drawn.prompts, whose, strict=True))
    cut = [Response(r.ids[: limits[name]], r.finished) for r, name in zip(drawn.responses, whose, strict=True)]
    return Rollouts(prompts, tuple(cut))


def gradients(run: Any) -> dict[str, torch.Tensor]:
    """This rank's shards, as they were formed."""
    from prune_opd.weights.mapping import local_parameters

    return {name: p.main_grad.clone() for name, p in local_parameters(run.trainer.chunks).items()}


def leave_gradient(run: Any, source: Path, out: Path) -> None:
    """Write the gradient as if it were the model."""
    from prune_opd.weights.mapping import local_parameters
    from prune_opd.weights.stream import export_hf

    parameters = list(local_parameters(run.trainer.chunks).values())
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter.main_grad)
        export_hf(run.trainer.chunks, source, out, write=True)
        for parameter, values in zip(parameters, kept, strict=True):
            parameter.copy_(values)


def distance(run: Any, reference: Path, local: dict[str, torch.Tensor]) -> float:
    """Of this rank's shards from the reference's, a Hugging Face directory: largest difference by largest value."""
    from prune_opd.weights.load import SafetensorsDirectory, read_shard
    from prune_opd.weights.mapping import entries

    files, groups = SafetensorsDirectory(reference), run.layout.student.groups
    farthest = largest = 0.0
    for entry in entries(run.trainer.spec):
        if entry.megatron in local:
            expected = read_shard(entry, files, *entry.shard_of(groups)).float()
            farthest = max(farthest, (local[entry.megatron].float() - expected).abs().max().item())
            largest = max(largest, expected.abs().max().item())
    return farthest / largest


def train(run: Any, whose: str, first: Any) -> list[dict[str, Any]]:
    """Three steps. first: called after the first one, when its gradient is still there."""
    steps = []
    for number in range(1, STEPS + 1):
        limits = {name: controller.horizon for name, controller in run.controller.of.items()}
        steps.append(train_step(run, rollouts_of(number, whose, limits)))
        if number == 1:
            first()
    return steps


def alone(models: Path, out: Path, layout: Any, parallel: ParallelConfig) -> dict[str, Any]:
    """What each teacher gives to the gradient by itself, on its own rows, in a run that has but that teacher."""
    found: dict[str, Any] = {}
    for name, path, objective in (("a", "teacher", ObjectiveConfig(k=8)), ("b", "other", OTHER)):
        config = train_config(
            models, 1, teacher=str(models / path), objective=objective, parallel=parallel, optimizer=PLAIN
        )
        run, drawn = build_run(config, layout, out), made_up_rollouts(1)
        rows = [row for row, whose in enumerate(MIXED) if whose == name]
        window = run.controller.horizon
        cut = [Response(drawn.responses[row].ids[:window], drawn.responses[row].finished) for row in rows]
        record = train_step(run, Rollouts(tuple(drawn.prompts[row] for row in rows), tuple(cut)))
        found[name] = {"record": record, "gradient": gradients(run)}
    return found


def main(models: Path, out: Path) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts
    from prune_opd.weights.mapping import local_parameters
    from prune_opd.weights.stream import export_hf

    single = ParallelConfig(tensor=1, microbatch_tokens=BUDGET)
    layout = layouts.initialize(single, machine, seed=0)
    results: dict[str, Any] = {}
    if layout.world == 1:
        for reference, whose in REFERENCES.items():
            run = build_run(config_of(models, reference, single, {}, {}), layout, out)
            seen: dict[str, Any] = {}

            def first() -> None:
                seen.update(gradients(run))  # noqa: B023
                if reference != "bf16":  # noqa: B023
                    leave_gradient(run, models / "student", out / f"{reference}.gradient")  # noqa: B023

            results[reference] = {"steps": train(run, whose, first)}
            if reference == "bf16":
                results[reference]["gradient"] = distance(run, out / "mixed.full.gradient", seen)
            else:
                export_hf(run.trainer.chunks, models / "student", out / reference, write=True)
            if reference == "mixed":
                results["sum"] = by_sum(alone(models, out, layout, single), seen)
                leave_reference_of_bf16(models, out, layout, single)
    else:
        for case, (student, a, b, whose) in CASES.items():
            parallel, reference = ParallelConfig(microbatch_tokens=BUDGET, **student), reference_of(case)
            run = build_run(config_of(models, reference, parallel, a, b), layouts.arrange(parallel, seed=0), out)
            found: dict[str, Any] = {}
            gradient = out / f"{'mixed.full' if reference == 'bf16' else reference}.gradient"

            def first() -> None:
                found["gradient"] = distance(run, gradient, gradients(run))  # noqa: B023

            found["steps"] = train(run, whose, first)
            if reference != "bf16":
                local = {name: p.detach() for name, p in local_parameters(run.trainer.chunks).items()}
                found["parameters"] = distance(run, out / reference, local)
            del run
            gc.collect()
            everyone: list[Any] = [None] * layout.world
            dist.all_gather_object(everyone, found)
            results[case] = everyone
    if layout.is_main:
        (out / f"{layout.world}.json").write_text(json.dumps(results))
    dist.barrier()
    layouts.shutdown()


def by_sum(each: dict[str, Any], both: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The gradient with both teachers against the token-weighted sum of those with one: Σ w_i · N_i · g_i / Σ N_i."""
    tokens = {name: of["record"]["tokens"] for name, of in each.items()}
    farthest = largest = 0.0
    for name, gradient in both.items():
        a, b = (each[who]["gradient"][name] * tokens[who] for who in "ab")
        expected = (a + WEIGHT * b) / sum(tokens.values())
        farthest = max(farthest, (gradient - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    return {"gradient": farthest / largest, **{name: of["record"] for name, of in each.items()}}


def leave_reference_of_bf16(models: Path, out: Path, layout: Any, single: ParallelConfig) -> None:
    """The first gradient of the bf16 case in fp32."""
    config = config_of(models, "bf16", single, {}, {})
    run = build_run(dataclasses.replace(config, precision=PrecisionConfig(params="fp32")), layout, out)
    train_step(run, rollouts_of(1, MIXED, {name: one.horizon for name, one in run.controller.of.items()}))
    leave_gradient(run, models / "student", out / "mixed.full.gradient")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
