"""Ranks of test_lora.py: steps of a student with adapters, in one layout after the other.

    torchrun … worker_lora.py MODELS OUT

Every case of this number of ranks; on one rank also what needs no other (`alone`). Writes OUT/<ranks>.json from rank 0,
{case: result}, and for each case OUT/<case>/: gradients.safetensors (of the first step), hf/ and hf/adapter/.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from prune_opd import platform
from prune_opd.config import LoraConfig, ParallelConfig, PrecisionConfig
from prune_opd.config.lora import TARGETS
from prune_opd.config.teacher import TeacherEmaConfig
from tests.distributed.tiny_run import build_run, made_up_rollouts, train_config, train_step, whole_parameters

STEPS = 2
BUDGET = 48  # tokens: several micro-batches on every rank
LORA = LoraConfig(rank=4, alpha=8.0)
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}},
    2: {
        "TP2": {"tensor": 2},
        "TP2+SP": {"tensor": 2, "sequence_parallel": True},
        "PP2": {"tensor": 1, "pipeline": 2},
        "PP2xVPP2": {"tensor": 1, "pipeline": 2, "virtual_pipeline": 2},
        "DP2": {"tensor": 1},
        "DP2+dist-opt": {"tensor": 1, "distributed_optimizer": True},
        "PP2 recompute full": {"tensor": 1, "pipeline": 2, "recompute": "full"},
        "TP2+SP recompute full": {"tensor": 2, "sequence_parallel": True, "recompute": "full"},
        "TP2+SP recompute selective": {"tensor": 2, "sequence_parallel": True, "recompute": "selective"},
    },
    4: {
        "TP2+SPxPP2xVPP2": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence_parallel": True},
        "TP2xDP2+dist-opt": {"tensor": 2, "distributed_optimizer": True},
    },
}
# Also in bf16, and with a model whose q, k and v have biases and whose head is its own.
IN_BF16 = ("one", "TP2", "TP2+SP", "PP2")
OTHER_MODEL = ("one", "TP2+SP", "PP2")


def cases(ranks: int) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """{name: (model, number format, settings of `parallel`)}"""
    layouts = LAYOUTS[ranks]
    found = {name: ("qwen3", "fp32", settings) for name, settings in layouts.items()}
    found |= {f"bf16 {name}": ("qwen3", "bf16", layouts[name]) for name in IN_BF16 if name in layouts}
    return found | {f"qwen2 {name}": ("qwen2", "fp32", layouts[name]) for name in OTHER_MODEL if name in layouts}


def reference_of(case: str) -> str:
    kind, _, _ = case.partition(" ")
    return "qwen2 one" if kind == "qwen2" else "one"


@torch.no_grad()
def shake(chunks: Any) -> None:
    """Give each b values, the same in every layout: with b = 0 no a has a gradient."""
    from prune_opd.weights.adapters import adapter_entries
    from prune_opd.weights.mapping import local_parameters

    here = local_parameters(chunks)
    for number, entry in enumerate(adapter_entries(chunks[0].spec, chunks[0].lora)):
        draw = torch.Generator().manual_seed(number)
        wholes = [0.05 * torch.randn(shape, generator=draw) for shape in entry.shapes]
        if entry.megatron.endswith(".b") and entry.megatron in here:
            index, count = entry.shard_of(chunks[0].pg_collection)
            parts = entry.cut.parts(here[entry.megatron], entry.shapes, index, count)
            for part, piece in zip(parts, entry.cut.slices(wholes, index, count), strict=True):
                part.copy_(piece)


def whole_adapters(chunks: Any, attribute: str = "data") -> dict[str, Tensor]:
    """The adapters, or what lies beside them as `attribute`, as whole tensors under the names of their entries."""
    from prune_opd.weights import stream
    from prune_opd.weights.adapters import adapter_entries
    from prune_opd.weights.mapping import local_parameters

    here = {name: getattr(p, attribute) for name, p in local_parameters(chunks).items() if ".adapter." in name}
    with mock.patch.object(stream, "local_parameters", lambda chunks: here):
        table = list(adapter_entries(chunks[0].spec, chunks[0].lora))
        return {name: x.clone() for name, x in stream.Resharder(chunks, in_order=True, table=table).stream()}


def train(models: Path, out: Path, layout: Any, case: str, lora: LoraConfig = LORA) -> tuple[Any, dict[str, Any]]:
    from prune_opd.megatron.logprobs import sampled_logprobs
    from prune_opd.weights.stream import export_hf

    model, params, settings = cases(layout.world).get(case, ("qwen3", "fp32", {"tensor": 1}))
    parallel = ParallelConfig(microbatch_tokens=BUDGET, **settings)
    config = train_config(models / model, 1, parallel=parallel, lora=lora, precision=PrecisionConfig(params=params))
    run = build_run(config, layout, out / case)
    shake(run.trainer.chunks)
    run.trainer.optimizer.reload_model_params()  # fp32 masters
    steps = [train_step(run, made_up_rollouts(1))]
    if not parallel.distributed_optimizer:  # there a rank has a share of the sum
        gradients = whole_adapters(run.trainer.chunks, "main_grad")
        if layout.is_main:
            save_file(gradients, out / case / "gradients.safetensors")
    steps += [train_step(run, made_up_rollouts(number)) for number in range(2, STEPS + 1)]
    export_hf(run.trainer.chunks, config.student, out / case / "hf", write=layout.is_main)
    return run, {
        "steps": steps,
        "logprobs": sampled_logprobs(run.trainer.chunks, made_up_rollouts(0), layout, run.machine.device),
        "frozen": held_of_frozen(run),
    }


def held_of_frozen(run: Any) -> dict[str, Any]:
    """What the trainer has beside the weights: numbers in buffers, in the optimizer, and in adapters."""
    from prune_opd.megatron.offload import optimizer_tensors

    trained = [p for chunk in run.trainer.chunks for p in chunk.parameters() if p.requires_grad]
    others = [p for chunk in run.trainer.chunks for p in chunk.parameters() if not p.requires_grad]
    buffers = [b for chunk in run.trainer.ddp for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return {
        "adapters": sum(p.numel() for p in trained),
        "buffers": sum(sum(p.numel() for p in buffer.params) for buffer in buffers),
        "optimizer": sum(x.numel() for x in {id(x): x for x in optimizer_tensors(run.trainer.optimizer)}.values()),
        "gradients of others": [list(p.shape) for p in others if p.grad is not None or hasattr(p, "main_grad")],
        "others": sum(p.numel() for p in others),
    }


def first_step_is_the_base(models: Path, layout: Any, dtype: torch.dtype) -> dict[str, bool]:
    """Whether fresh adapters leave the hidden states and the streamed weights as they were, bit for bit."""
    from prune_opd.megatron.lora import attach
    from prune_opd.megatron.model import build
    from prune_opd.megatron.packing import pack

    prompts, responses = made_up_rollouts(1).prompt_ids, made_up_rollouts(1).response_ids
    batches = pack(prompts, responses, range(len(responses)), BUDGET, torch.device("cpu"))
    (chunk,) = chunks = build(models / "qwen3" / "student", layout.student, dtype, trainable=True)
    with torch.no_grad():
        before, weights = [chunk(batch) for batch in batches], whole_parameters(chunks)
        attach(chunks, LORA, seed=0)
        after, merged = [chunk(batch) for batch in batches], whole_parameters(chunks)
    return {
        "hidden states": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
        "weights": weights.keys() == merged.keys() and all(torch.equal(weights[name], merged[name]) for name in merged),
    }


def average_takes_in_the_adapters(models: Path, out: Path, layout: Any) -> float:
    """Largest difference of a teacher at the moving average from the mean of the student before and after."""
    settings = {"teacher": "ema", "teacher_ema": TeacherEmaConfig(decay=0.5), "lora": LORA}
    run = build_run(train_config(models / "qwen3", 1, **settings), layout, out / "ema")
    before = whole_parameters(run.trainer.chunks)
    shake(run.trainer.chunks)
    run.trainer.average.update()
    after, average = whole_parameters(run.trainer.chunks), whole_parameters(run.teacher.chunks)
    assert any((after[name] - before[name]).abs().max() > 0.01 for name in before)
    return max((average[name] - (before[name] + after[name]) / 2).abs().max().item() for name in before)


def alone(models: Path, out: Path, layout: Any, reference: dict[str, Any]) -> dict[str, Any]:
    """What one rank can say: single targets, recomputation, the output head's gradient, and the first step."""
    from prune_opd.loss import chunk as loss_chunk

    found: dict[str, Any] = {"targets": {}, "start": {}}
    for target in TARGETS:
        run, result = train(models, out, layout, f"only {target}", LoraConfig(rank=4, alpha=8.0, targets=(target,)))
        names = {name.rpartition(".adapter")[0].rpartition(".")[2] for name, p in named(run) if p.requires_grad}
        found["targets"][target] = [sorted(names), [step["loss"] for step in result["steps"]]]
    for dtype in (torch.float32, torch.bfloat16):
        found["start"][str(dtype)] = first_step_is_the_base(models, layout, dtype)
    with mock.patch.object(loss_chunk, "add_weight_gradient_") as products:
        train(models, out, layout, "no head gradient")
    found["head gradients"] = products.call_count
    found["average"] = average_takes_in_the_adapters(models, out, layout)
    return found


def named(run: Any) -> Any:
    return [pair for chunk in run.trainer.chunks for pair in chunk.named_parameters()]


def main(models: Path, out: Path) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts

    layout = layouts.initialize(ParallelConfig(tensor=1), machine, seed=0)
    results: dict[str, Any] = {}
    for case, (_, _, settings) in cases(layout.world).items():
        layout = layouts.arrange(ParallelConfig(microbatch_tokens=BUDGET, **settings), seed=0)
        if layout.is_main:
            (out / case).mkdir(parents=True)
        dist.barrier()
        _, result = train(models, out, layout, case)
        everyone: list[Any] = [None] * layout.world
        dist.all_gather_object(everyone, result)
        results[case] = everyone
    if layout.world == 1:
        for case in ("no head gradient", *(f"only {target}" for target in TARGETS)):
            (out / case).mkdir()
        results["alone"] = alone(models, out, layout, results["one"][0])
    if layout.is_main:
        (out / f"{layout.world}.json").write_text(json.dumps(results))
    dist.barrier()
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
