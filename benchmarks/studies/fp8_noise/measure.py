"""One measurement of `prune-opd bench fp8-noise`: one model against itself in other number formats.

The model answers held-out ledger problems (T = 1), or has random weights and reads random tokens.

Every variant of the model reads the same tokens. The top-k ids of each, overlap and events are the product's own
(loss/vocab_parallel.py, method/gate.py), at the positions that predict a response token.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import answer, model_shape, write_model
from benchmarks.studies.fp8_noise.emulation import Recipe, emulated
from prune_opd import platform
from prune_opd.config import DataConfig, ParallelConfig, RolloutConfig
from prune_opd.loss.vocab_parallel import OutputHead, topk
from prune_opd.method.gate import overlap_events, overlap_ratio

KS = (1, 2, 4, 8, 16)
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
SEED = 20_000
HEAD_CHUNK = 1024


@dataclass(frozen=True)
class Variant:
    """A number format of the model. The head is not FP8, as megatron-core's is not."""

    name: str
    params: str = "bf16"
    recipe: str | None = None
    bf16_ends: int = 0


VARIANTS = (
    Variant("fp32", params="fp32"),
    Variant("bf16"),
    Variant("tensorwise", recipe="tensorwise"),
    Variant("delayed", recipe="delayed"),
    Variant("blockwise", recipe="blockwise"),
    Variant("tensorwise, ends bf16", recipe="tensorwise", bf16_ends=1),
    Variant("blockwise, ends bf16", recipe="blockwise", bf16_ends=1),
)
# Who is compared with whom: the control, one side in FP8, both sides in FP8 but not the same.
PAIRS = (
    ("bf16", "fp32"),
    *((variant.name, "bf16") for variant in VARIANTS[2:]),
    ("tensorwise", "blockwise"),
    ("delayed", "blockwise"),
    ("tensorwise", "delayed"),
)


# ---------------------------------------------------------------------------------------------------- one variant


class Measured:
    """One variant's hidden_MH at the predicting positions, and its top-k ids there."""

    def __init__(self, variant: Variant, chunks: dict[str, Any], batches: Sequence[Any]) -> None:
        model = chunks[variant.params]
        recipe = Recipe(variant.recipe) if variant.recipe else None
        with torch.no_grad():
            with emulated(model, recipe, variant.bf16_ends) if recipe else nullcontext():
                hiddens = [model(batch)[batch.predicting_M] for batch in batches]
            self.hidden_MH = torch.cat(hiddens[1:])  # the first only warms up the delayed scales
            self.top_MK = top_ids(self.hidden_MH, model.head_weight(), model.spec.vocab_size)


def top_ids(hidden_MH: Tensor, weight_VH: Tensor, vocab_size: int) -> Tensor:
    """Ids of the largest max(KS) logits, best first; the logits are formed as in the loss."""
    head = OutputHead("student", hidden_MH, weight_VH, 1.0, vocab_size, None)
    head.allocate(min(HEAD_CHUNK, len(hidden_MH)), torch.float32)
    parts = [slice(begin, begin + HEAD_CHUNK) for begin in range(0, len(hidden_MH), HEAD_CHUNK)]
    return torch.cat([topk(head.logits(part), max(KS), head.shard).ids_NK for part in parts])


# ---------------------------------------------------------------------------------------------------- comparing


def compare(student: Measured, teacher: Measured) -> list[dict[str, Any]]:
    """Overlap and events by k."""
    rows = []
    for k in KS:
        overlap_M = overlap_ratio(student.top_MK[:, :k], teacher.top_MK[:, :k])
        rates = {g: overlap_events(overlap_M, k, g).double().mean().item() for g in THRESHOLDS}
        rows.append({"k": k, "overlap": overlap_M.double().mean().item(), "event_rate": rates})
    return rows


def compare_all(model_dir: Path, batches: Sequence[Any], layout: Any) -> dict[str, Any]:
    from prune_opd.megatron.model import build, dtype_of

    chunks = {
        params: build(model_dir, layout.student, dtype_of(params), trainable=False)[0] for params in ("fp32", "bf16")
    }
    measured = {variant.name: Measured(variant, chunks, batches) for variant in VARIANTS}
    reference_MH = measured["bf16"].hidden_MH.float()
    spec = chunks["bf16"].spec
    return {
        "shape": {"layers": spec.layers, "hidden": spec.hidden, "ffn": spec.ffn, "vocabulary": spec.vocab_size},
        "tokens": len(reference_MH),
        "hidden_error": {  # relative to bf16
            name: ((other.hidden_MH.float() - reference_MH).norm() / reference_MH.norm()).item()
            for name, other in measured.items()
        },
        "pairs": [
            {"student": student, "teacher": teacher, "by_k": compare(measured[student], measured[teacher])}
            for student, teacher in PAIRS
        ],
    }


# ---------------------------------------------------------------------------------------------------- tokens


def own_rollouts(model_dir: Path, problems: int, max_len: int, machine: platform.Platform) -> tuple[Any, Any]:
    """Prompts and the model's own responses on the ledger task, T = 1, as a training step would sample them."""
    from prune_opd.data.prompts import held_out
    from prune_opd.data.tokenizer import load_tokenizer
    from prune_opd.rollout.engine import RolloutEngine
    from prune_opd.rollout.request import TokenSampling, new_rows

    tokenizer = load_tokenizer(model_dir)
    data = DataConfig(source="ledger")
    prompts = held_out(data, tokenizer, SEED, problems)
    longest = max(len(prompt.ids) for prompt in prompts)
    engine = RolloutEngine(str(model_dir), RolloutConfig(max_prompt_len=longest), max_len, torch.float32, machine)
    rollouts = engine.generate(new_rows(prompts, 1, max_len), TokenSampling(SEED, step=0))
    return rollouts.prompt_ids, rollouts.response_ids


def random_tokens(vocab: int, tokens: int, length: int = 128) -> tuple[Any, Any]:
    draw = torch.Generator().manual_seed(SEED)
    rows = [torch.randint(vocab, (length,), generator=draw).tolist() for _ in range(math.ceil(tokens / length))]
    return [row[:8] for row in rows], [row[8:] for row in rows]


def measure(
    microbatch: int,
    model: str | None = None,
    problems: int = 0,
    max_len: int = 0,
    random: tuple[int, int, int] = (0, 0, 0),
    tokens: int = 0,
) -> dict[str, Any]:
    """`model` on its own rollouts of `problems`, or one with random weights (hidden, layers, vocabulary) on `tokens`.

    microbatch: tokens of one call, of which delayed scaling keeps the largest values.
    """
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.packing import pack

    layout = layouts.initialize(ParallelConfig(tensor=1), machine, seed=0)
    with tempfile.TemporaryDirectory(prefix="prune-opd-") as folder:
        if model is None:
            hidden, layers, vocab = random
            write_model(Path(folder), model_shape(layers, hidden), vocab)
            prompts, responses = random_tokens(vocab, tokens + microbatch)
        else:
            prompts, responses = own_rollouts(Path(model), problems, max_len, machine)
        batches = pack(prompts, responses, range(len(prompts)), microbatch, machine.device)
        return {"torch": torch.__version__, **compare_all(Path(model or folder), batches, layout)}


if __name__ == "__main__":
    answer(measure)
