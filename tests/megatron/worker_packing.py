"""The process of test_packing.py: packed rows through our core attention against padded rows through megatron-core's.

    torchrun … worker_packing.py MODELS OUT

MODELS/student and MODELS/teacher are model directories. Writes OUT/results.json: the largest differences by case, and
the tensors of some packed batches.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune_opd import platform
from prune_opd.config import GateConfig, ObjectiveConfig, ParallelConfig
from tests.distributed.tiny_run import made_up_rollouts

LENGTHS = ((5, 9), (2, 1), (11, 32), (1, 17), (3, 2))  # of each row's prompt and response
MULTIPLES = (1, 16)
SCALES = (None, 0.4)  # None: the usual 1 / √head dimension
GATE = GateConfig(k=8, threshold=0.5, w_drop=0.15)

Hidden = Callable[[Any], Tensor]  # of a model: hidden states of every real token, row after row


def distance(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected number (which is below 10 in all that is compared)."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


def padded_hidden(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """The rows as one [B, T] batch, filled up to the longest, through megatron-core's own attention."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    longest = max(map(len, rows))
    ids_BT = torch.tensor([[*row, *[7] * (longest - len(row))] for row in rows])
    position_BT = torch.arange(longest).expand_as(ids_BT)
    ours = [layer.self_attention.core_attention for layer in model.decoder.layers]
    for layer, attention in zip(model.decoder.layers, ours, strict=True):
        layer.self_attention.core_attention = DotProductAttention(
            model.config, layer.layer_number, AttnMaskType.causal, "self", softmax_scale=attention.softmax_scale
        )
    hidden_TBH = GPTModel.forward(model, ids_BT, position_BT, attention_mask=None)
    for layer, attention in zip(model.decoder.layers, ours, strict=True):
        layer.self_attention.core_attention = attention
    return torch.cat([hidden_TBH[: len(row), i] for i, row in enumerate(rows)])


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))


def compare(student: Any, teacher: Any, batch: Any, rows: list[list[int]]) -> dict[str, Any]:
    """Hidden states, and the loss, gate and gradients of a whole distillation step, packed and padded."""
    from prune_opd.loss import Head, Method, Tokens, distill_loss

    real = sum(map(len, rows))

    def step(hidden: Hidden) -> dict[str, Any]:
        student_NH = hidden(student)
        with torch.no_grad():
            teacher_NH = hidden(teacher)
        loss, tokens, stats = distill_loss(
            Head(student_NH[batch.predicting_M], student.head_weight()),
            Head(teacher_NH[batch.predicting_M], teacher.head_weight()),
            Tokens(batch.sampled_ids_M, batch.cu_responses, student.spec.vocab_size),
            Method(GATE, ObjectiveConfig(k=8)),
        )
        # A plain function of every token's hidden state too: the prompt's count there as well.
        draw = torch.Generator().manual_seed(0)
        everything = (student_NH * torch.randn(student_NH.shape, generator=draw)).sum()
        return {
            "hidden": student_NH.detach(),
            "loss": loss.detach(),
            "tokens": tokens,
            "stats": stats,
            "step": gradients(student, loss / tokens),
            "all": gradients(student, everything),
        }

    packed, padded = step(lambda model: model(batch)[:real]), step(lambda model: padded_hidden(model, rows))
    seen, expected = packed["stats"], padded["stats"]
    return {
        "hidden": distance(packed["hidden"], padded["hidden"]),
        "loss": distance(packed["loss"], padded["loss"]),
        "weight": distance(seen.weight_N, expected.weight_N),
        "tokens": [packed["tokens"], padded["tokens"]],
        "same_gate": torch.equal(seen.event_N, expected.event_N) and torch.equal(seen.overlap_N, expected.overlap_N),
        "event_rate": seen.event_N.double().mean().item(),
        "step_gradients": {name: distance(grad, padded["step"][name]) for name, grad in packed["step"].items()},
        "all_gradients": {name: distance(grad, padded["all"][name]) for name, grad in packed["all"].items()},
    }


def fp8_step(layout: Any, machine: Any, student: Any) -> dict[str, Any]:
    """Token counts of a run's micro-batches, and its record, as the precision asks for them (nothing computes)."""
    from prune_opd.megatron.train_batch import make_batch

    # As check/precision.py sets them; without Transformer Engine no such model can be built.
    student.config.fp8, student.config.fp8_recipe = "hybrid", "delayed"
    batch = make_batch(made_up_rollouts(), 1, layout.student, 64, student.token_multiple, machine.device)
    student.config.fp8 = None
    tokens = [len(microbatch.ids_N) for microbatch in batch.microbatches]
    return {"tokens": tokens, "waste": batch.packing["padding_waste_packed"]}


def main(models: Path, out: Path) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.model import build
    from prune_opd.megatron.packing import pack, pack_rows

    layout = layouts.initialize(ParallelConfig(tensor=1), machine, seed=0)
    (student,) = build(models / "student", layout.student, torch.float32, trainable=True)
    (teacher,) = build(models / "teacher", layout.teacher, torch.float32, trainable=False)
    draw = torch.Generator().manual_seed(4)

    def ids(count: int) -> list[int]:
        return torch.randint(3, student.spec.vocab_size, (count,), generator=draw).tolist()

    prompts, responses = ([ids(lengths[i]) for lengths in LENGTHS] for i in range(2))
    rows = [(prompt + response)[:-1] for prompt, response in zip(prompts, responses, strict=True)]

    def as_lists(structure: Any) -> dict[str, Any]:
        return {name: x.tolist() if isinstance(x, Tensor) else x for name, x in vars(structure).items()}

    results: dict[str, Any] = {"prompts": prompts, "responses": responses}
    results["core_attention"] = [type(layer.self_attention.core_attention).__name__ for layer in student.decoder.layers]
    for scale in SCALES:
        for model in (student, teacher):
            for layer in model.decoder.layers:
                layer.self_attention.core_attention.softmax_scale = scale
        for multiple in MULTIPLES:
            batch = pack_rows(prompts, responses, range(len(rows)), machine.device, multiple)
            results[f"{scale} {multiple}"] = compare(student, teacher, batch, rows)
    results["batches"] = {
        multiple: [as_lists(batch) for batch in pack(prompts, responses, (4, 0, 1, 2, 3), 32, machine.device, multiple)]
        for multiple in MULTIPLES
    }
    results["empty"] = as_lists(pack_rows(prompts, responses, (), machine.device, 4))
    segments = pack_rows(prompts, responses, (0, 1), machine.device, 16).attention_segments()
    results["segments"] = {**as_lists(segments), "dtype": str(segments.cu_seqlens_q.dtype)}
    results["fp8"] = fp8_step(layout, machine, student)
    (out / "results.json").write_text(json.dumps(results))
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
