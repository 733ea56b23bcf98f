"""Ranks of test_hint_layouts.py: a teacher that reads other prompts than the student, in one layout after the other.

    torchrun … worker_hint.py MODELS OUT

On one rank: the references. On two: every case. Writes OUT/<ranks>.json from rank 0: {case: [results of each rank]}.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd import platform
from prune_opd.config import InflightConfig, ParallelConfig, TeacherEmaConfig
from prune_opd.data.prompt import Prompt
from prune_opd.rollout.batch import Rollouts
from prune_opd.rollout.request import NOTHING
from tests.distributed.tiny_run import build_run, made_up_rollouts, train_config, train_step, whole_parameters

STEPS, RESUMED_AT = 2, 1
DECAY = 0.75
HINTS = (40, 0, 3, 21, 60, 0, 11)  # tokens of what the teacher reads, by row; 0: the student's prompt
BUDGETS = (64, 4096)  # tokens of a micro-batch: a row or two, and all rows together
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2 | TP1": {"tensor": 2, "teacher_tensor": 1},
    "TP2 | TP2": {"tensor": 2},
    "PP2 | TP2": {"tensor": 1, "pipeline": 2, "teacher_tensor": 2, "teacher_pipeline": 1},
    "PP2 | PP2": {"tensor": 1, "pipeline": 2},
    "PP2xVPP2 | TP1": {"tensor": 1, "pipeline": 2, "virtual_pipeline": 2, "teacher_pipeline": 1},
    "TP2+SP | PP2": {"tensor": 2, "sequence_parallel": True, "teacher_tensor": 1, "teacher_pipeline": 2},
    "DP2 | TP1": {"tensor": 1},
    "CP2 | TP1": {"tensor": 1, "context": 2},
    "CP2 | TP2": {"tensor": 1, "context": 2, "teacher_tensor": 2},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "EP2 | TP1": {"tensor": 1, "expert": 2},
    "EP2 | EP2": {"tensor": 1, "expert": 2, "teacher_expert": 2},
    "PP2 | EP2": {"tensor": 1, "pipeline": 2, "teacher_pipeline": 1, "teacher_expert": 2},
}
# What is distilled: the models' folder, the teacher, whether it reads hints. "ema" and "moe" keep a moving average.
KINDS: dict[str, tuple[str, str, bool]] = {
    "plain": ("dense", "another", False),
    "hint": ("dense", "another", True),
    "student": ("dense", "student", True),
    "ema": ("dense", "ema", True),
    "untied": ("untied", "ema", True),
    "moe": ("moe", "ema", True),
}


def cases() -> dict[str, dict[str, Any]]:
    """{"kind: student layout | teacher layout": settings of ParallelConfig}, on two ranks."""
    found = {f"hint: {name}": sizes for name, sizes in LAYOUTS.items()}
    few = ("TP2 | TP1", "TP2 | TP2", "PP2 | TP2", "PP2xVPP2 | TP1", "TP2+SP | PP2", "DP2 | TP1", "CP2 | TP2")
    found |= {f"ema: {name}": LAYOUTS[name] for name in few}
    found |= {f"untied: {name}": LAYOUTS[name] for name in ("TP2 | TP1", "PP2 | TP2", "PP2 | PP2", "DP2 | TP1")}
    found["student: PP2 | TP2"] = LAYOUTS["PP2 | TP2"]
    return found | {f"moe: {name}": sizes for name, sizes in EXPERTS.items()}


def rollouts(number: int, hinted: bool) -> Rollouts:
    return made_up_rollouts(number, HINTS if hinted else ())


@torch.no_grad()
def teacher_logprobs(run: Any, batch: Rollouts) -> list[list[float]]:
    """log q of every response token of every row by the product's own path, on every rank."""
    dealt = run.train_batch(batch).deals
    hidden, student, found = run.teacher.hidden(batch, dealt), run.layout.student, {}
    if student.is_last_stage:
        weight_VH = run.teacher.head_weight
        shards = [torch.empty_like(weight_VH) for _ in range(student.tp)]
        dist.all_gather(shards, weight_VH.contiguous(), group=student.groups.tp)
        whole_VH = torch.cat(shards)[: run.teacher.spec.vocab_size]
        for row, hidden_TH in hidden.of_row.items():
            logq_TV = (hidden_TH @ whole_VH.T).double().log_softmax(-1)
            ids_T = torch.tensor(batch.responses[row].ids)
            found[row] = logq_TV[torch.arange(len(ids_T)), ids_T].tolist()
    everyone: list[Any] = [None] * run.layout.world
    dist.all_gather_object(everyone, found)
    return [row for _, row in sorted({number: row for part in everyone for number, row in part.items()}.items())]


def looked(run: Any, batch: Rollouts) -> list[Any]:
    """What a look of the in-flight gate finds: of the batch, of students who read the hints themselves, and of none.

    Each: whether each response token is an event (on rank 0), and the tokens that the teacher read.
    """
    from prune_opd.inflight.gate import InflightGate
    from prune_opd.rollout.stepwise import Prefix

    gate = replace(run.config.gate, metric="teacher_top_p", top_p=0.9)
    rollout = replace(run.config.rollout, inflight=InflightConfig(mode="gate", first_check=4))
    watch = InflightGate(replace(run.config, gate=gate, rollout=rollout), run.teacher, run.layout, run.vocab_size)
    found = []
    readers = zip(batch.prompts, batch.teacher_prompt_ids, strict=True)
    shown = [Prompt(prompt.index, ids, None, prompt.source) for prompt, ids in readers]
    for prompts in (batch.prompts, shown, [replace(prompt, teacher_ids=None) for prompt in batch.prompts]):
        watch.begin(prompts, [32] * len(prompts), [NOTHING] * len(prompts))
        watch.stop([Prefix(row, ids, 0) for row, ids in enumerate(batch.response_ids)])
        found.append([watch.evidence, watch.teacher_tokens])
    return found


def teacher_weights(run: Any) -> dict[str, Tensor]:
    """This rank's weights of the teacher, and the loss's output matrix."""
    from prune_opd.weights.mapping import local_parameters

    found = {name: weight.detach().clone() for name, weight in local_parameters(run.teacher.chunks).items()}
    if run.layout.student.is_last_stage:
        found["head"] = run.teacher.head_weight.detach().clone()
    return found


def farthest_from_mean(run: Any, students: list[dict[str, Tensor]]) -> float:
    """Largest difference of this rank's teacher from the average of whole students, by the formula in fp64."""
    from prune_opd.megatron.average import _cut
    from prune_opd.weights.mapping import entries

    mean = {name: tensor.double() for name, tensor in students[0].items()}
    for student in students[1:]:
        mean = {name: DECAY * tensor + (1 - DECAY) * student[name].double() for name, tensor in mean.items()}
    spec, layout, got = run.teacher.spec, run.layout, teacher_weights(run)
    head = "embedding.word_embeddings.weight" if spec.tied else "output_layer.weight"
    farthest = 0.0
    for entry in entries(spec):
        wholes = [mean[name] for name in entry.hf]
        if entry.megatron in got:
            expected = _cut(entry, wholes, layout.teacher.groups)
            farthest = max(farthest, (got[entry.megatron] - expected).abs().max().item())
        if entry.megatron == head and "head" in got:
            expected = _cut(entry, wholes, layout.student.groups)
            farthest = max(farthest, (got["head"] - expected).abs().max().item())
    return farthest


def train(models: Path, out: Path, kind: str, layout: Any, parallel: ParallelConfig) -> dict[str, Any]:
    pair, teacher, hinted = KINDS[kind]
    changes: dict[str, Any] = (
        {"parallel": parallel} if teacher == "another" else {"parallel": parallel, "teacher": teacher}
    )
    if teacher == "ema":
        changes["teacher_ema"] = TeacherEmaConfig(DECAY)
    config = train_config(models / pair, 1, **changes)
    run = build_run(config, layout, out)
    result: dict[str, Any] = {"logprobs": teacher_logprobs(run, rollouts(0, hinted))}
    if kind == "hint":
        result["looks"] = looked(run, rollouts(0, hinted))
    students, steps, before = [whole_parameters(run.trainer.chunks)], [], teacher_weights(run)
    for number in range(1, STEPS + 1):
        steps.append(train_step(run, rollouts(number, hinted)))
        students.append(whole_parameters(run.trainer.chunks))
        if number == RESUMED_AT and teacher == "ema":
            run.save_checkpoint()
            run.checkpoints.finish()
    after = teacher_weights(run)
    result |= {"steps": steps, "moved": max((after[name] - before[name]).abs().max().item() for name in after)}
    if teacher == "ema":
        result["mean"], result["alike"] = farthest_from_mean(run, students), run.trainer.average.alike
        result["resumed"] = resumed(build_run(config, layout, out), hinted, steps, after)
    return result


def resumed(run: Any, hinted: bool, steps: list[dict[str, Any]], teacher: dict[str, Tensor]) -> bool:
    """Whether a run that goes on from the checkpoint has the same numbers and the same teacher, bit for bit."""
    run.load_checkpoint(run.checkpoints.latest())
    again = [train_step(run, rollouts(number, hinted)) for number in range(RESUMED_AT + 1, STEPS + 1)]
    got = teacher_weights(run)
    return again == steps[RESUMED_AT:] and all(torch.equal(got[name], weight) for name, weight in teacher.items())


def main(models: Path, out: Path) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron import model
    from prune_opd.megatron.local_layers import PackedSdpaAttention
    from tests.distributed.context_attention import GatheredSdpaAttention

    layout = layouts.initialize(ParallelConfig(tensor=1), machine, seed=0)
    wanted = {f"{kind}: {budget}": {"tensor": 1, "microbatch_tokens": budget} for kind in KINDS for budget in BUDGETS}
    if layout.world > 1:
        wanted = {case: {"microbatch_tokens": BUDGETS[0], **sizes} for case, sizes in cases().items()}
    results: dict[str, list[Any]] = {}
    for number, (case, sizes) in enumerate(wanted.items()):
        parallel = ParallelConfig(**sizes)
        model.PackedSdpaAttention = GatheredSdpaAttention if parallel.context > 1 else PackedSdpaAttention
        result = train(
            models,
            out / f"{layout.world}-{number}",
            case.partition(":")[0],
            layouts.arrange(parallel, seed=0),
            parallel,
        )
        everyone: list[Any] = [None] * layout.world
        dist.all_gather_object(everyone, result)
        results[case] = everyone
        if layout.is_main:
            print(case, flush=True)  # where a launch that is not done stands
    if layout.is_main:
        (out / f"{layout.world}.json").write_text(json.dumps(results))
    dist.barrier()
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
