"""Accuracy of the weights that the rollout engine holds: sample answers, score them, average, keep some."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_opd.config import DataConfig, TrainConfig
from prune_opd.data.answers import Accuracy, avg_at_k, score_responses
from prune_opd.data.prompt import Prompt, PromptSource
from prune_opd.data.prompts import held_out, make_source, task_name
from prune_opd.rollout.batch import Rollouts
from prune_opd.rollout.request import TokenSampling, new_rows
from prune_opd.track.metrics import Record

if TYPE_CHECKING:  # the command line reads this module, and torch takes seconds
    from prune_opd.rollout.engine import RolloutEngine


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled: `samples` for each problem, of at most `max_len` tokens, always with the same seeds."""

    samples: int
    max_len: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class Scored:
    """Sampled and scored answers to a task's problems, in order.

    Row i of `rollouts`, `texts` and `answers` (what could be read of a text, or None) is sample i % k of problem
    i // k; `correct` is indexed [problem][sample].
    """

    task: str
    rollouts: Rollouts
    texts: tuple[str, ...]
    answers: tuple[str | None, ...]
    correct: tuple[tuple[bool, ...], ...]

    @property
    def accuracy(self) -> Accuracy:
        return avg_at_k(self.correct)

    @property
    def readable(self) -> float:
        """Share of the responses that an answer could be read from."""
        return sum(answer is not None for answer in self.answers) / len(self.answers)

    @property
    def mean_length(self) -> float:
        """Mean length of the responses [tokens]."""
        return self.rollouts.tokens / len(self.texts)

    @property
    def finished(self) -> float:
        """Share of the responses that ended by themselves."""
        return sum(self.rollouts.finished_B) / len(self.texts)


class Evaluator:
    """A fixed set of problems, sampled with the same seeds at every call: only the weights change from call to call.

    Args:
        task: the name that the results carry.
        source: scores the answers.
        problems: every one with a reference answer.
    """

    def __init__(
        self, tokenizer: Any, task: str, source: PromptSource, problems: Sequence[Prompt], sampling: Sampling
    ) -> None:
        self.tokenizer, self.task, self.source = tokenizer, task, source
        self.problems, self.sampling = problems, sampling

    def run(self, engine: RolloutEngine) -> Scored:
        """Sample from the engine's weights and score. Collective: every rank calls it and gets the same."""
        sampling = self.sampling
        tokens = TokenSampling(sampling.seed, 0, sampling.temperature, sampling.top_p)
        rollouts = engine.generate(new_rows(self.problems, sampling.samples, sampling.max_len), tokens)
        texts = self.tokenizer.batch_decode(
            [list(response) for response in rollouts.response_ids], skip_special_tokens=True
        )
        k = sampling.samples
        grouped = [texts[i : i + k] for i in range(0, len(texts), k)]
        correct = score_responses(self.source, self.problems, grouped)
        answers = tuple(map(self.source.read, texts))
        return Scored(self.task, rollouts, tuple(texts), answers, tuple(map(tuple, correct)))


def make_evaluator(
    tokenizer: Any, data: DataConfig, problems: int, max_prompt_len: int | None, sampling: Sampling, extract: str
) -> Evaluator:
    """The evaluator of `problems` held-out problems of `data.source`, or of all that a file has; `extract`: EvalConfig.

    Raises:
        ConfigError: there is no such task or file, a prompt does not fit `max_prompt_len`, a row has no answer.
    """
    source = make_source(data, tokenizer, sampling.seed, max_prompt_len, stream="held_out", extract=extract)
    chosen = held_out(data, tokenizer, sampling.seed, problems, max_prompt_len)
    return Evaluator(tokenizer, task_name(data.source), source, chosen, sampling)


def make_evaluators(config: TrainConfig, tokenizer: Any) -> list[Evaluator]:
    """One for each task of a run; none if it has no evaluation."""
    settings = config.evaluation
    if settings.problems == 0:
        return []
    length = settings.max_len or config.horizon.max_len
    sampling = Sampling(settings.samples, length, settings.temperature, settings.top_p, settings.seed)
    longest = config.rollout.max_prompt_len
    return [
        make_evaluator(
            tokenizer,
            replace(config.data.without_hint(), source=source),
            settings.problems,
            longest,
            sampling,
            settings.extract,
        )
        for source in settings.sources or config.data.sources
    ]


def evaluation_record(
    engine: RolloutEngine, evaluators: Sequence[Evaluator], step: int, generations: Path | None, keep: int
) -> Record:
    """The evaluation line of metrics.jsonl after `step` updates, over all tasks. Collective.

    A rank that gives the folder `generations` writes `keep` answers of every task to step-NNNNNN.jsonl in it.
    `eval_response_length` is the mean of the tasks' means, in tokens.
    """
    started = time.perf_counter()
    record: Record = {"step": step}
    scored = [evaluator.run(engine) for evaluator in evaluators]
    for result in scored:
        name, accuracy = f"eval_{result.task}", result.accuracy
        record[name] = accuracy.mean
        record[f"{name}_stderr"] = accuracy.stderr
        record[f"{name}_low"], record[f"{name}_high"] = accuracy.interval
        record[f"{name}_pass"] = accuracy.pass_at_k
        record[f"{name}_readable"], record[f"{name}_answers"] = result.readable, len(result.answers)
    record["eval_response_length"] = sum(result.mean_length for result in scored) / len(scored)
    if generations is not None and keep:
        rows = [
            row
            for result, evaluator in zip(scored, evaluators, strict=True)
            for row in generation_rows(result, evaluator.tokenizer, keep)
        ]
        write_rows(generations / f"step-{step:06d}.jsonl", rows)
    return record | {"time_eval": time.perf_counter() - started}


def generation_rows(scored: Scored, tokenizer: Any, keep: int | None = None) -> list[Record]:
    """One object for each answer, in the order of the task; only the first `keep` answers (None: all)."""
    k = len(scored.correct[0])
    rows = list(zip(scored.rollouts.prompts, scored.rollouts.responses, scored.texts, strict=True))
    return [
        {
            "task": scored.task,
            "problem": prompt.index,
            "sample": i % k,
            "source": prompt.source,
            "prompt": tokenizer.decode(list(prompt.ids)),
            "response": text,
            "read": scored.answers[i],
            "answer": prompt.answer,
            "correct": scored.correct[i // k][i % k],
            "tokens": len(response.ids),
            "finished": response.finished,
        }
        for i, (prompt, response, text) in enumerate(rows[:keep])
    ]


def write_rows(path: Path, rows: Sequence[Record]) -> None:
    """One JSON object a line; a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    unfinished.replace(path)
