"""Accuracy of the weights that the rollout engine holds: sample answers, score them, average."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from prune_opd.data.prompts import Prompt, PromptSource
from prune_opd.eval.answers import Accuracy, avg_at_k, score_responses
from prune_opd.rollout.engine import RolloutEngine


class Evaluator:
    """A fixed set of problems, sampled with the same seeds at every call: two evaluations differ by weights only.

    `max_len` is in response tokens; it is the full horizon, whatever window the training has at the moment.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: Any,
        source: PromptSource,
        problems: Sequence[Prompt],
        samples: int,
        max_len: int,
        temperature: float,
        top_p: float,
        seed: int,
    ):
        self.engine, self.tokenizer, self.source, self.problems = engine, tokenizer, source, problems
        self.samples, self.max_len, self.temperature, self.top_p, self.seed = samples, max_len, temperature, top_p, seed

    def accuracy(self, problems: int | None = None) -> tuple[Accuracy, float]:
        """(avg@samples over the first `problems`, or all; mean response length in tokens). Every rank calls it."""
        chosen = self.problems[:problems]
        rollouts = self.engine.generate(
            chosen,
            self.samples,
            self.max_len,
            seed=self.seed,
            step=0,
            temperature=self.temperature,
            top_p=self.top_p,
        )
        texts = self.tokenizer.batch_decode(
            [list(response) for response in rollouts.response_ids], skip_special_tokens=True
        )
        grouped = [texts[i : i + self.samples] for i in range(0, len(texts), self.samples)]
        correct = score_responses(self.source, chosen, grouped)
        return avg_at_k(correct), rollouts.tokens / len(rollouts.responses)

    def record(self, step: int, problems: int | None = None) -> dict[str, Any]:
        """The evaluation line of metrics.jsonl after `step` updates, over the first `problems` or all."""
        started = time.perf_counter()
        accuracy, length = self.accuracy(problems)
        name = f"eval_{self.source.name}"
        return {
            "step": step,
            name: accuracy.mean,
            f"{name}_stderr": accuracy.stderr,
            "eval_response_length": length,
            "time_eval": time.perf_counter() - started,
        }
