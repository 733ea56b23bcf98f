"""One measurement of `prune-opd bench pair-check`: a model and the teacher of a pair, on gold text and own rollouts.

The model answers held-out problems at T = 1: its accuracy, and the overlap of its top-k with the teacher's at every
token of those rollouts. The same overlap along worked solutions without a mistake shows what the position alone does.
The top-k ids, overlap and events are the product's own (loss/vocab_parallel.py, method/gate.py), at the gate's k and γ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import answer
from benchmarks.studies.fp8_noise.measure import top_ids
from prune_opd import platform
from prune_opd.config import CorpusConfig, ParallelConfig, SftConfig, TrainConfig
from prune_opd.config.yaml import load_config
from prune_opd.data.answers import avg_at_k, score_responses
from prune_opd.data.ledger import encode, random_stream, worked_solution
from prune_opd.data.tasks import LedgerSource
from prune_opd.errors import UserError
from prune_opd.method.gate import apply_gate_packed, overlap_events, overlap_ratio

Rows = Sequence[Sequence[int]]


def gold_corpus(teacher: Path) -> CorpusConfig:
    """What the teacher was last taught, without any of the mistakes in it. UserError if no sft recipe made it."""
    config = load_config(teacher / "sft_config.yaml")
    if not isinstance(config, SftConfig):
        raise UserError(f"{teacher} was not made by an sft recipe: pair-check takes tiny pairs")
    last = config.stages[-1].corpus
    return replace(last, reverse=0.0, slip=0.0, slip_result=0.0, carry_bug=0.0, given=0.0, given_wrong=0.0)


def curves(overlap_M: Tensor, event_M: Tensor, lengths: Sequence[int], bins: int, max_len: int) -> dict[str, Any]:
    """Means by position, in `bins` of equal width over `max_len`; null where there are no tokens.

    overlap_M, event_M: one value a response token, responses end to end, `lengths` tokens each.
    """
    position_M = torch.cat([torch.arange(length) for length in lengths])
    bin_M = (position_M * bins // max_len).clamp_max(bins - 1)
    count = torch.bincount(bin_M, minlength=bins).double()

    def means(value_M: Tensor) -> list[float | None]:
        total = torch.bincount(bin_M, weights=value_M.double(), minlength=bins)
        return [t / n if n else None for t, n in zip(total.tolist(), count.tolist(), strict=True)]

    return {"overlap": means(overlap_M), "events": means(event_M), "tokens": [int(n) for n in count.tolist()]}


def measure(recipe: str, model: str, problems: int, seed: int, bins: int) -> dict[str, Any]:
    """The model in the directory `model` and the teacher of `recipe`, a resolved config file."""
    machine = platform.prepare()
    from transformers import AutoTokenizer

    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.model import build
    from prune_opd.megatron.packing import pack
    from prune_opd.rollout.engine import RolloutEngine
    from prune_opd.rollout.request import TokenSampling, new_rows

    config, model_dir = load_config(Path(recipe)), Path(model)
    assert isinstance(config, TrainConfig) and config.gate is not None
    gate, max_len, teacher_dir = config.gate, config.horizon.max_len, Path(config.teacher)
    layout = layouts.initialize(ParallelConfig(tensor=1), machine, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    source = LedgerSource(tokenizer, config.data, seed, stream="held_out")
    prompts = [source.get(index) for index in range(problems)]
    engine = RolloutEngine(str(model_dir), config.rollout, max_len, torch.float32, machine)
    rollouts = engine.generate(new_rows(prompts, 1, max_len), TokenSampling(seed, step=0))
    texts = tokenizer.batch_decode([list(ids) for ids in rollouts.response_ids], skip_special_tokens=True)
    accuracy = avg_at_k(score_responses(source, prompts, [[text] for text in texts]))

    corpus = gold_corpus(teacher_dir)
    gold = [
        encode(worked_solution(source.task.problem(seed, i, "held_out"), random_stream("corpus", seed, i), corpus)[0])
        for i in range(problems)
    ]
    models = [build(d, layout.student, torch.float32, trainable=False)[0] for d in (model_dir, teacher_dir)]

    def compared(responses: Rows) -> dict[str, Any]:
        ids = rollouts.prompt_ids
        batches = pack(ids, responses, range(len(ids)), config.parallel.microbatch_tokens, machine.device)
        sides = []
        with torch.no_grad():
            for side in models:
                hidden_MH = torch.cat([side(batch)[batch.predicting_M] for batch in batches])
                sides.append(top_ids(hidden_MH, side.head_weight(), side.spec.vocab_size)[:, : gate.k])
        overlap_M = overlap_ratio(*sides)
        event_M = overlap_events(overlap_M, gate.k, gate.threshold)
        lengths = [len(responses[row]) for batch in batches for row in batch.rows]
        starts = list(accumulate(lengths, initial=0))
        reliable = sorted(apply_gate_packed(event_M, starts, gate).reliable_length_B.tolist())
        tenths = {str(q): reliable[min(len(reliable) * q // 100, len(reliable) - 1)] for q in (10, 25, 50, 75, 90)}
        return {**curves(overlap_M, event_M, lengths, bins, max_len), "reliable_length": tenths}

    result = {
        "accuracy": accuracy.mean,
        "stderr": accuracy.stderr,
        "response_length": rollouts.tokens / problems,
        "gold": compared(gold),
        "own": compared(rollouts.response_ids),
    }
    engine.close()  # not before: it takes the process groups with it
    return result


if __name__ == "__main__":
    answer(measure)
