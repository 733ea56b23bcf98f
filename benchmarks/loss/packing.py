"""`prune-opd bench packing`: a step's passes over packed rows, and over the same rows padded to the longest of them.

Both go through the same models, attention and loss, in one process and in turns; only the padding differs. Timed are
the teacher's forward pass, the student's forward pass, the loss and the backward pass; Adam's part is the same for both
and is left out. Lengths are those of worked ledger problems, cut at a horizon; the models have random weights.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from prune_opd.config import CorpusConfig, GateConfig, ModelShape, ObjectiveConfig, ParallelConfig
from prune_opd.data import ledger
from prune_opd.rollout.balance import deal, packing_record

if TYPE_CHECKING:
    import torch

    from prune_opd.megatron.packing import PackedBatch

SEED = 3
CORPUS = CorpusConfig(min_steps=20, max_steps=40)
Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Settings:
    """What is measured. The defaults are the tiny recipes' sizes; QUICK only shows that it works."""

    rows: int = 32
    shape: ModelShape = field(default_factory=ModelShape)
    horizons: tuple[int, ...] = (64, 128, 216)  # most response tokens
    ranks: int = 4  # data parallel, of the deal that is compared with dealing in turns
    rounds: int = 9


QUICK = Settings(rows=6, shape=ModelShape(layers=1, hidden=32, heads=2, kv_heads=1, ffn=32), horizons=(32,), rounds=1)


def run(path: Path, quick: bool) -> int:
    """Measure, write the JSON file, print the table. Returns 0."""
    from prune_opd import platform

    machine = platform.prepare()
    import torch

    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.model import build
    from prune_opd.testbed.sft import create_model

    settings, load = QUICK if quick else Settings(), os.getloadavg()
    layout = layouts.initialize(ParallelConfig(nproc=1, tensor=1), machine, SEED)
    with tempfile.TemporaryDirectory(prefix="prune-opd-") as folder:
        models = []
        for seed, trainable in ((SEED, True), (SEED + 1, False)):
            create_model(Path(folder), settings.shape, seed)
            models += build(folder, layout.student, torch.float32, trainable=trainable)
    student, teacher = (model.to(machine.device) for model in models)

    def step(batch: PackedBatch) -> float:
        return _step(student, teacher, batch)

    result = {
        "benchmark": "packing",
        "quick": quick,
        "settings": asdict(settings),
        "environment": {
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "load_average_before": load,
        },
        "cases": [_case(horizon, settings, step, machine.device) for horizon in settings.horizons],
    }
    layouts.shutdown()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _print(result, Console())
    print(path)
    return 0


def _case(
    horizon: int, settings: Settings, step: Callable[[PackedBatch], float], device: torch.device
) -> dict[str, Any]:
    from prune_opd.megatron.packing import pack_rows

    examples = [ledger.example(CORPUS, SEED, i) for i in range(settings.rows)]
    prompts, responses = [prompt for prompt, _ in examples], [response[:horizon] for _, response in examples]
    batches = {
        "packed": pack_rows(prompts, responses, range(settings.rows), device),
        "padded": pad_rows(prompts, responses, device),
    }
    losses = {name: step(batch) for name, batch in batches.items()}  # warms up, too
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for turn in range(settings.rounds):
        for name in sorted(batches, reverse=turn % 2 == 1):
            begin = time.perf_counter()
            step(batches[name])
            seconds[name].append(time.perf_counter() - begin)
    lengths = [len(prompt) + len(response) - 1 for prompt, response in zip(prompts, responses, strict=True)]
    everything, ranks = range(settings.rows), range(settings.ranks)
    in_turns = [[list(everything[rank :: settings.ranks])] for rank in ranks]
    dealt = deal(lengths, everything, settings.ranks, ParallelConfig().microbatch_tokens)
    record = packing_record(lengths, [dealt])
    return {
        "horizon": horizon,
        "tokens": {name: len(batch.ids_N) for name, batch in batches.items()},
        "padding_waste_padded": record["padding_waste_padded"],
        "padding_waste_packed": record["padding_waste_packed"],
        "dp_imbalance_in_turns": packing_record(lengths, [in_turns])["dp_imbalance"],
        "dp_imbalance_by_length": record["dp_imbalance"],
        "wall_s": seconds,
        "time_packed_over_padded": median(seconds["packed"]) / median(seconds["padded"]),
        "loss": losses,
        "loss_apart": abs(losses["packed"] - losses["padded"]) / abs(losses["padded"]),
    }


def pad_rows(prompts: Rows, responses: Rows, device: torch.device) -> PackedBatch:
    """The rows as a batch in which each is as long as the longest: what is added predicts nothing."""
    import torch

    from prune_opd.megatron.packing import DUMMY_ID, pack_rows, row_length

    sizes = [row_length(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    filled = [[*response, *[DUMMY_ID] * (max(sizes) - size)] for response, size in zip(responses, sizes, strict=True)]
    batch = pack_rows(prompts, filled, range(len(filled)), device)
    starts = batch.cu_responses.tolist()[:-1]
    own = [range(start, start + len(response)) for start, response in zip(starts, responses, strict=True)]
    real = pack_rows(prompts, responses, range(len(filled)), device)
    return replace(
        batch,
        predicting_M=batch.predicting_M[torch.tensor([i for positions in own for i in positions], device=device)],
        sampled_ids_M=real.sampled_ids_M,
        cu_responses=real.cu_responses,
    )


def _step(student: Any, teacher: Any, batch: PackedBatch) -> float:
    """Teacher pass, student pass, gated loss and gradients; the loss per token."""
    import torch

    from prune_opd.loss import Head, Method, Tokens, distill_loss

    with torch.no_grad():
        teacher_MH = teacher(batch)[batch.predicting_M]
    loss_sum, tokens, _ = distill_loss(
        Head(student(batch)[batch.predicting_M], student.head_weight()),
        Head(teacher_MH, teacher.head_weight()),
        Tokens(batch.sampled_ids_M, batch.cu_responses, student.spec.vocab_size),
        Method(GateConfig(k=4, threshold=0.5), ObjectiveConfig(k=16)),
    )
    student.zero_grad()
    (loss_sum / tokens).backward()
    return loss_sum.item() / tokens


def _print(result: dict[str, Any], console: Console) -> None:
    settings, environment = result["settings"], result["environment"]
    title = f"{settings['rows']} rows, {environment['threads']} thread(s), medians of {settings['rounds']} rounds"
    table = Table(title=f"{title}; imbalance of {settings['ranks']} data-parallel ranks", title_justify="left")
    for column in (
        "horizon",
        "tokens",
        "padded: padding",
        "packed: padding",
        "time packed / padded",
        "imbalance in turns",
        "by length",
    ):
        table.add_column(column, justify="right")
    for case in result["cases"]:
        table.add_row(
            str(case["horizon"]),
            f"{case['tokens']['packed']:,}",
            f"{case['padding_waste_padded']:.1%}",
            f"{case['padding_waste_packed']:.1%}",
            f"{case['time_packed_over_padded']:.2f}",
            f"{case['dp_imbalance_in_turns']:.3f}",
            f"{case['dp_imbalance_by_length']:.3f}",
        )
    console.print(table)
    apart = max(case["loss_apart"] for case in result["cases"])
    console.print(f"  loss of packed and padded rows: {apart:.1e} apart")
