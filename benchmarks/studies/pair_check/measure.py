"""One measurement of `prune-opd bench pair-check`: a model and the teacher of a pair, on gold text and own rollouts.

The model answers held-out problems at T = 1: its accuracy, and the overlap of its top-k with the teacher's at every
token of those rollouts. The same overlap along worked solutions without a mistake shows what the position alone does.
Sampling and comparing are those of `prune-opd bench pair` (pair/measure.py), at the recipe's gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks.common import answer
from benchmarks.studies.pair.measure import Row, along, curves, load, sample
from prune_opd.config import CorpusConfig, SftConfig, TrainConfig
from prune_opd.config.yaml import load_config
from prune_opd.data.answers import avg_at_k, score_responses
from prune_opd.data.ledger import encode, random_stream, worked_solution
from prune_opd.data.tasks import LedgerSource
from prune_opd.errors import UserError
from prune_opd.method.gate import apply_gate_packed


def gold_corpus(teacher: Path) -> CorpusConfig:
    """What the teacher was last taught, without any of the mistakes in it. UserError if no sft recipe made it."""
    config = load_config(teacher / "sft_config.yaml")
    if not isinstance(config, SftConfig):
        raise UserError(f"{teacher} was not made by an sft recipe: pair-check takes tiny pairs")
    last = config.stages[-1].corpus
    return replace(last, reverse=0.0, slip=0.0, slip_result=0.0, carry_bug=0.0, given=0.0, given_wrong=0.0)


def measure(recipe: str, model: str, problems: int, seed: int, bins: int) -> dict[str, Any]:
    """The model in the directory `model` and the teacher of `recipe`, a resolved config file."""
    from prune_opd.data.tokenizer import load_tokenizer

    config = load_config(Path(recipe))
    assert isinstance(config, TrainConfig) and config.gate is not None
    gate, max_len, tokenizer = config.gate, config.horizon.max_len, load_tokenizer(model)
    source = LedgerSource(tokenizer, config.data, seed, stream="held_out")
    prompts = [source.get(index) for index in range(problems)]
    student, teacher = load(model), load(config.teacher)
    own = sample(student, [prompt.ids for prompt in prompts], max_len, seed)
    texts = tokenizer.batch_decode([list(response) for _, response in own], skip_special_tokens=True)
    accuracy = avg_at_k(score_responses(source, prompts, [[text] for text in texts]))

    corpus = gold_corpus(Path(config.teacher))
    gold: list[Row] = [
        (
            prompt.ids,
            encode(
                worked_solution(source.task.problem(seed, i, "held_out"), random_stream("corpus", seed, i), corpus)[0]
            ),
        )
        for i, prompt in enumerate(prompts)
    ]

    def compared(rows: Sequence[Row]) -> dict[str, Any]:
        found, lengths = along(student, teacher, rows, gate), [len(response) for _, response in rows]
        gated = apply_gate_packed(found["event"], [0, *accumulate(lengths)], gate)
        reliable = sorted(gated.reliable_length_B.tolist())
        tenths = {str(q): reliable[min(len(reliable) * q // 100, len(reliable) - 1)] for q in (10, 25, 50, 75, 90)}
        of_overlap = curves(found["overlap"], found["event"], lengths, bins, max_len)
        kl = curves(found["reverse_kl"], found["event"], lengths, bins, max_len)["overlap"]
        return {**of_overlap, "kl": kl, "reliable_length": tenths}

    return {
        "accuracy": accuracy.mean,
        "stderr": accuracy.stderr,
        "response_length": sum(len(response) for _, response in own) / problems,
        "gold": compared(gold),
        "own": compared(own),
    }


if __name__ == "__main__":
    answer(measure)
