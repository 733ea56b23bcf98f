"""Ranks of test_layout_matrix.py: three steps of Prune-OPD on made-up rollouts, in one layout after the other.

    torchrun … worker_layout_matrix.py MODELS OUT

On one rank: the references, each of which leaves its student in OUT/<reference>. On more: every case of that world
size, against its reference. Writes OUT/<ranks>.json from rank 0: {case: [results of each rank]}.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prune_opd import platform
from prune_opd.config import ParallelConfig
from prune_opd.method.advantage import advantages
from prune_opd.ranks import gloo
from prune_opd.rollout.batch import Response, Rollouts
from prune_opd.rollout.reward import Rewards
from tests.distributed.tiny_run import OPTIMIZER, build_run, made_up_rollouts, train_config, train_step

CPU = torch.device("cpu")
STEPS = 3
UPDATES = 3
BUDGET = 48  # tokens: several micro-batches on every rank
STUDENT: dict[int, dict[str, dict[str, Any]]] = {  # by number of ranks
    2: {
        "TP2": {"tensor": 2},
        "PP2": {"tensor": 1, "pipeline": 2},
        "TP2+SP": {"tensor": 2, "sequence_parallel": True},
        "DP2": {"tensor": 1},
        "DP2+dist-opt": {"tensor": 1, "distributed_optimizer": True},
        "PP2xVPP2": {"tensor": 1, "pipeline": 2, "virtual_pipeline": 2},
    },
    4: {
        "TP2xPP2": {"tensor": 2, "pipeline": 2},
        "TP2xDP2": {"tensor": 2},
        "PP2xDP2": {"tensor": 1, "pipeline": 2},
    },
}
TEACHER: dict[str, dict[str, Any]] = {
    "TP1": {"teacher_tensor": 1, "teacher_pipeline": 1},
    "TP2": {"teacher_tensor": 2, "teacher_pipeline": 1},
    "PP2": {"teacher_tensor": 1, "teacher_pipeline": 2},
}
MORE: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "PP2 recompute full": {"tensor": 1, "pipeline": 2, "recompute": "full"},
        "TP2+SP recompute selective": {"tensor": 2, "sequence_parallel": True, "recompute": "selective"},
        "3 updates PP2 | TP2": {"tensor": 1, "pipeline": 2, "teacher_tensor": 2, "teacher_pipeline": 1},
        "3 updates PP2xVPP2 | PP2": {"tensor": 1, "pipeline": 2, "virtual_pipeline": 2},
        # Context parallel cases run with the tests' own core attention (context_attention.py).
        "CP2 | TP2": {"tensor": 1, "context": 2, "teacher_tensor": 2},
        "CP2+dist-opt | TP1": {"tensor": 1, "context": 2, "distributed_optimizer": True},
        "3 updates CP2 | TP1": {"tensor": 1, "context": 2},
        # Some of the tokens are an older student's, as with rollout.partial.
        "stale TP2+SP | TP2": {"tensor": 2, "sequence_parallel": True},
        "stale DP2 | TP1": {"tensor": 1},
        "stale CP2 | TP1": {"tensor": 1, "context": 2},
        # Responses have a task's rewards beside the teacher.
        "reward TP2+SP | TP2": {"tensor": 2, "sequence_parallel": True},
        "reward DP2 | TP1": {"tensor": 1},
        "reward CP2 | TP1": {"tensor": 1, "context": 2},
        "moe CP2xEP2 | TP1": {"tensor": 1, "context": 2, "expert": 2},
        "moe EP2 | TP1": {"tensor": 1, "expert": 2},
        "moe EP2+dist-opt | EP2": {"tensor": 1, "expert": 2, "distributed_optimizer": True, "teacher_expert": 2},
        "moe EP2 | TP2xEP2": {"tensor": 1, "expert": 2, "teacher_tensor": 2, "teacher_expert": 2},
        "moe PP2 | EP2": {
            "tensor": 1,
            "pipeline": 2,
            "teacher_pipeline": 1,
            "teacher_expert": 2,
        },
    },
    4: {
        "TP2xPP2xVPP2+SP | TP2xPP2": {
            "tensor": 2,
            "pipeline": 2,
            "virtual_pipeline": 2,
            "sequence_parallel": True,
        },
        "TP2+SPxCP2 | TP2xPP2": {
            "tensor": 2,
            "sequence_parallel": True,
            "context": 2,
            "teacher_pipeline": 2,
        },
        "PP2xCP2 | TP2": {"tensor": 1, "pipeline": 2, "context": 2, "teacher_tensor": 2, "teacher_pipeline": 1},
        "moe TP2+SPxEP2 | PP2": {
            "tensor": 2,
            "expert": 2,
            "sequence_parallel": True,
            "teacher_tensor": 1,
            "teacher_pipeline": 2,
        },
        "moe TP2+SPxEP4 | TP2xEP2": {
            "tensor": 2,
            "expert": 4,
            "sequence_parallel": True,
            "teacher_expert": 2,
        },
        "PP2xDP2+dist-opt | TP2xPP2": {
            "tensor": 1,
            "pipeline": 2,
            "distributed_optimizer": True,
            "teacher_tensor": 2,
        },
    },
}


def cases(ranks: int) -> dict[str, dict[str, Any]]:
    """{"student layout | teacher layout": settings of ParallelConfig}"""
    matrix = {
        f"{student} | {teacher}": {**ours, **theirs}
        for student, ours in STUDENT[ranks].items()
        for teacher, theirs in TEACHER.items()
    }
    return matrix | MORE[ranks]


# What the cases are compared with: which models, and updates per batch of rollouts.
REFERENCES = {
    "dense": ("dense", 1),
    "3 updates": ("dense", UPDATES),
    "moe": ("moe", 1),
    "stale": ("dense", UPDATES),
    "reward": ("dense", UPDATES),
}


def made_up_rewards(rollouts: Rollouts) -> Rewards:
    """Of either sign, a different one for every response."""
    reward_B = tuple(math.sin(row + sum(ids)) for row, ids in enumerate(rollouts.response_ids))
    return Rewards(reward_B, tuple(advantages(reward_B, 1, "batch")), responses=1, failed=0)


def reference_of(case: str) -> str:
    """By how the case's name begins."""
    return next((name for name in REFERENCES if case.startswith(name)), "dense")


def step(run: Any, number: int, stale: bool = False) -> dict[str, Any]:
    """One step on responses that end where the horizon is: what the controller decides shows in the next loss."""
    drawn, horizon = made_up_rollouts(number), run.controller.horizon
    cut = [Response(response.ids[:horizon], response.finished) for response in drawn.responses]
    if stale:  # every other response's first half, by a student not far from this one
        from prune_opd.megatron.logprobs import sampled_logprobs

        known = iter(sampled_logprobs(run.trainer.chunks, Rollouts(drawn.prompts, tuple(cut)), run.layout, CPU))
        for row, response in enumerate(cut):
            then = tuple(next(known) + 0.4 * math.sin(7 * row + t) for t in range(len(response.ids)))
            stale_tokens = (len(response.ids) + 1) // 2 if row % 2 == 0 else 0
            cut[row] = dataclasses.replace(response, logprobs=then, stale=stale_tokens)
    return train_step(run, Rollouts(drawn.prompts, tuple(cut)))


def farthest_from_reference(run: Any, reference: Path) -> float:
    """Largest difference of this rank's parameters from the reference's, which are a Hugging Face directory."""
    from prune_opd.weights.load import SafetensorsDirectory, read_shard
    from prune_opd.weights.mapping import entries, local_parameters

    local, files = local_parameters(run.trainer.chunks), SafetensorsDirectory(reference)
    groups = run.layout.student.groups
    farthest = 0.0
    for entry in entries(run.trainer.spec):
        if entry.megatron in local:
            expected = read_shard(entry, files, *entry.shard_of(groups))
            farthest = max(farthest, (local[entry.megatron].detach() - expected).abs().max().item())
    return farthest


def teacher_extras(run: Any) -> list[str]:
    """Whatever the teacher holds beside its weights; and the student's weights, which must have it (a cross-check)."""
    extras = [
        name
        for chunk in run.teacher.chunks
        for name, weight in chunk.named_parameters()
        if weight.requires_grad or weight.grad is not None or hasattr(weight, "main_grad")
    ]
    held = {id(group_weight) for group in run.trainer.optimizer.param_groups for group_weight in group["params"]}
    extras += [f"optimizer: {name}" for c in run.teacher.chunks for name, w in c.named_parameters() if id(w) in held]
    assert all(hasattr(weight, "main_grad") for chunk in run.trainer.chunks for weight in chunk.parameters())
    return extras


def train(models: Path, out: Path, reference: str, layout: Any, parallel: ParallelConfig) -> tuple[Any, dict[str, Any]]:
    from prune_opd.megatron.logprobs import sampled_logprobs

    started = time.perf_counter()
    pair, updates = REFERENCES[reference]
    optimizer = dataclasses.replace(OPTIMIZER, updates_per_batch=updates)
    run = build_run(train_config(models / pair, 1, parallel=parallel, optimizer=optimizer), layout, out)
    run.reward = made_up_rewards if reference == "reward" else None
    steps = [step(run, number, reference == "stale") for number in range(1, STEPS + 1)]
    return run, {
        "steps": steps,
        "logprobs": sampled_logprobs(run.trainer.chunks, made_up_rollouts(0), layout, run.machine.device),
        "teacher_extras": teacher_extras(run),
        "teacher_head_rows": None if run.teacher._head_weight is None else len(run.teacher._head_weight),
        "seconds": time.perf_counter() - started,
    }


def socket_threads() -> int:
    """Threads of this process that wait for gloo's sockets, each of which wakes up 100 times a second."""
    names = (path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    return sum(name == "gloo_tcp_loop" for name in names)


def devices_of_two_interfaces() -> int:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo,lo"
    try:
        return len(gloo.devices(-1))
    finally:
        del os.environ["GLOO_SOCKET_IFNAME"]


def main(models: Path, out: Path) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron import model
    from prune_opd.megatron.local_layers import PackedSdpaAttention
    from prune_opd.weights.stream import export_hf
    from tests.distributed.context_attention import GatheredSdpaAttention

    alone = ParallelConfig(tensor=1, microbatch_tokens=BUDGET)
    layout = layouts.initialize(alone, machine, seed=0)
    results: dict[str, list[Any]] = {}
    if layout.world == 1:
        for reference, (pair, _) in REFERENCES.items():
            run, result = train(models, out, reference, layout, alone)
            export_hf(run.trainer.chunks, models / pair / "student", out / reference, write=True)
            results[reference] = [result]
        results["devices of two interfaces"] = [devices_of_two_interfaces()]
    else:
        for case, settings in cases(layout.world).items():
            parallel = ParallelConfig(microbatch_tokens=BUDGET, **settings)
            reference = reference_of(case)
            model.PackedSdpaAttention = GatheredSdpaAttention if parallel.context > 1 else PackedSdpaAttention
            run, result = train(models, out, reference, layouts.arrange(parallel, seed=0), parallel)
            result["parameters"] = farthest_from_reference(run, out / reference)
            result["socket_threads"] = socket_threads()
            del run
            gc.collect()
            everyone: list[Any] = [None] * layout.world
            dist.all_gather_object(everyone, result)
            results[case] = everyone
            if layout.is_main:
                print(f"{case}: {result['seconds']:.1f} s, parameters within {result['parameters']:.1e}", flush=True)
    if layout.is_main:
        (out / f"{layout.world}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
