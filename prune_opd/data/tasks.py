"""Procedural tasks as sources of prompts: the ledger, and those of reasoning-gym by name."""

from __future__ import annotations

import difflib
import hashlib
import re
from typing import Any

import yaml

from prune_opd.config import CorpusConfig, DataConfig
from prune_opd.config.yaml import parse
from prune_opd.data import gym_words
from prune_opd.data.extract import read_answer
from prune_opd.data.hint import filled, fitting, hint_limit, with_hint
from prune_opd.data.ledger import (
    EOS,
    TOKEN_ID,
    VOCABULARY,
    Ledger,
    Problem,
    encode,
    random_stream,
    worked_solution,
)
from prune_opd.data.prompt import Prompt, Tokenizer
from prune_opd.data.render import encode_text, prompt_text
from prune_opd.errors import ConfigError

GYM = "reasoning_gym/"
TRIES = 100  # problems that are drawn until one is short enough, at most


class LedgerSource:
    """Endless ledger problems. `stream` is "train" or, for evaluation, "held_out": streams never share their numbers.

    Raises:
        ConfigError: the tokenizer is not the ledger's.
    """

    name = Ledger.name
    size = None

    def __init__(self, tokenizer: Tokenizer, data: DataConfig, seed: int, *, stream: str = "train") -> None:
        if not is_the_ledgers(tokenizer):
            raise ConfigError(
                f"data.source = 'ledger' needs the ledger's tokenizer ({len(VOCABULARY)} tokens), the model has "
                "another one: take a model made by the sft recipes, or a .jsonl file of prompts"
            )
        self.task = Ledger(data.min_steps, data.max_steps)
        self.seed = seed
        self.stream = stream
        self._tokenizer, self._hint = tokenizer, data.teacher_prompt

    def get(self, index: int) -> Prompt:
        return self._prompt(self.task.problem(self.seed, index, self.stream))

    def solution(self, problem: Problem) -> list[str]:
        """The words of a worked solution without errors, `<eos>` at the end: the same ones at every call."""
        return worked_solution(problem, random_stream("reference", self.seed, problem.index), CorpusConfig())[0]

    def check_hints(self, limit: int | None) -> None:
        """ConfigError if the tokenizer lacks words of `data.teacher_prompt`, or its longest prompt has too many tokens.

        limit: most tokens of a teacher's prompt.
        """
        if self._hint is not None:
            fitting(self._prompt(Problem(0, (1,) * self.task.max_steps, 0)), limit)

    def _prompt(self, problem: Problem) -> Prompt:
        return Prompt(
            problem.index,
            tuple(encode(problem.prompt_words)),
            problem.answer,
            self.name,
            None if self._hint is None else self._hinted(problem, self._hint),
        )

    def _hinted(self, problem: Problem, hint: str) -> tuple[int, ...]:
        solution = " ".join(word for word in self.solution(problem) if word != EOS)
        text = filled(hint, {"prompt": problem.prompt, "answer": problem.answer, "solution": solution})
        try:
            return encode_text(text, self._tokenizer)
        except ConfigError as error:
            raise ConfigError(
                f"data.teacher_prompt = {hint!r}: {error}; the ledger has words of its own only"
            ) from error

    def read(self, response_text: str) -> str | None:
        return self.task.read(response_text)

    def score(self, response_text: str, prompt: Prompt) -> bool:
        assert prompt.answer is not None
        return self.task.score(response_text, prompt.answer)


class ReasoningGymSource:
    r"""Endless problems of a reasoning-gym task: `reasoning_gym/countdown`, `reasoning_gym/countdown?max_numbers=4`.

    After the question mark come settings of the task. The task's own scorer gets the response's last <answer>…</answer>
    or, without one, what `extract` reads (extract.py); a score of 1 is right. `stream`: as in LedgerSource.

    Where the tokenizer is the ledger's, a task that its words can tell is told in them (gym_words.py).

    Raises:
        ConfigError: there is no such task, it has no such settings, or the tokenizer cannot encode a prompt.
    """

    size = None

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Tokenizer,
        seed: int,
        max_prompt_len: int | None,
        *,
        stream: str,
        extract: str = "box",
    ) -> None:
        self.name, self._extract = data.source, extract
        self._task, _, settings = self.name.removeprefix(GYM).partition("?")
        self._settings = _settings(self.name, settings)
        self._data, self._tokenizer = data, tokenizer
        self._seed, self._stream, self._max_prompt_len = seed, stream, max_prompt_len
        self._in_words = self._task == gym_words.SORTING and is_the_ledgers(tokenizer)
        if self._in_words:
            self._settings = gym_words.SETTINGS | self._settings
        self.get(0) if data.teacher_prompt else self._problem(0)

    def get(self, index: int) -> Prompt:
        """The first short enough problem of the `TRIES` that an index has. ConfigError if all are too long."""
        for attempt in range(TRIES):
            problem = self._problem(index, attempt)
            row = {"question": problem[1]["question"], "answer": str(problem[1]["answer"])}
            text = gym_words.told(self._task, problem[1]) if self._in_words else None
            if text is not None:
                row["question"] = text  # what a hint stands beside is what the student reads
            ids = encode_text(text or prompt_text(row, self._data, self._tokenizer), self._tokenizer)
            if self._max_prompt_len is None or len(ids) <= self._max_prompt_len:
                prompt = Prompt(index * TRIES + attempt, ids, row["answer"], self.name)
                return with_hint(prompt, row, self._data, self._tokenizer, hint_limit(self._data, self._max_prompt_len))
        raise ConfigError(
            f"data.source = {self.name!r}: {TRIES} problems in a row have more than rollout.max_prompt_len = "
            f"{self._max_prompt_len} tokens: raise it, or set an easier task"
        )

    def worked(self, index: int) -> tuple[int, ...] | None:
        """The ids of a right response to a prompt that is told in the ledger's words; None for any other."""
        if not self._in_words:
            return None
        _, entry = self._problem(*divmod(self.get(index).index, TRIES))
        return tuple(encode(gym_words.worked(entry, random_stream("reference", self._seed, index))))

    def read(self, response_text: str) -> str | None:
        if self._in_words:
            return gym_words.answer_in(response_text)
        tagged = re.findall(r"<answer>(.*?)</answer>", response_text, flags=re.S)
        return tagged[-1].strip() if tagged else read_answer(response_text, self._extract)

    def score(self, response_text: str, prompt: Prompt) -> bool:
        dataset, entry = self._problem(*divmod(prompt.index, TRIES))
        answer = self.read(response_text)
        return answer is not None and dataset.score_answer(answer, entry) >= 1

    def _problem(self, index: int, attempt: int = 0) -> tuple[Any, dict[str, Any]]:
        """A problem, and a dataset of it alone: datasets of neighbouring seeds overlap in reasoning-gym."""
        import reasoning_gym

        key = f"{self._stream}/{self._seed}/{index}/{attempt}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little")  # some tasks take 32 bits
        try:
            dataset = reasoning_gym.create_dataset(self._task, seed=seed, size=1, **self._settings)
        except ValueError as error:
            known = list(reasoning_gym.factory.DATASETS)
            if self._task in known:
                raise ConfigError(f"data.source = {self.name!r}: reasoning-gym says {error}") from error
            near = difflib.get_close_matches(self._task, known, n=1, cutoff=0.0)
            raise ConfigError(f"data.source = {self.name!r} is no task: did you mean {GYM + near[0]!r}?") from error
        except (TypeError, AssertionError) as error:
            raise ConfigError(f"data.source = {self.name!r}: {self._task} does not take that ({error})") from error
        return dataset, dataset[0]


def is_the_ledgers(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has the ledger's words with the ledger's ids."""
    return list(tokenizer.convert_tokens_to_ids(list(VOCABULARY))) == list(TOKEN_ID.values())


def sorting_example(seed: int, index: int, numbers: tuple[int, int] = (6, 12)) -> tuple[list[int], list[int]]:
    """(prompt ids, response ids) of a supervised example of `number_sorting`. numbers: fewest and most to sort."""
    import reasoning_gym

    rng = random_stream("corpus", seed, index)
    least, most = numbers
    dataset = reasoning_gym.create_dataset(
        gym_words.SORTING,
        seed=int(rng.integers(2**31)),
        size=1,
        min_numbers=least,
        max_numbers=most,
        **gym_words.SETTINGS,
    )
    prompt = gym_words.told(gym_words.SORTING, dataset[0])
    assert prompt is not None  # whole numbers from 0 to 99
    return encode(prompt.split()), encode(gym_words.worked(dataset[0], rng))


def _settings(source: str, text: str) -> dict[str, Any]:
    parts = [part.partition("=") for part in text.split("&") if part]
    if any(not separator for _, separator, _ in parts):
        raise ConfigError(f"data.source = {source!r}: write settings as TASK?name=value&name=value")
    try:
        return {name: parse(value) for name, _, value in parts}
    except yaml.YAMLError as error:
        raise ConfigError(f"data.source = {source!r}: {' '.join(str(error).split())}; quote the value") from error
