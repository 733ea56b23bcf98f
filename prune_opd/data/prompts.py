"""Where prompts come from and in which order: sources (the ledger task, a JSONL file), the sampler, held-out problems.

    make_source(config.data, tokenizer, seed, max_prompt_len) ─▶ PromptSource ─▶ PromptSampler.next(n) ─▶ n Prompts

A source is random access and knows how its answers are scored. The sampler is a counter: its state is one number, and
every rank that makes the same one draws the same prompts.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from prune_opd.config import DataConfig
from prune_opd.data.ledger import TOKEN_ID, VOCABULARY, Ledger, encode, random_stream
from prune_opd.errors import ConfigError
from prune_opd.eval.answers import math_equal

PROCEDURAL_SOURCES = (Ledger.name,)
SHOWN_LINES = 10  # bad rows of a file that are named one by one

Tokenizer = Any  # a Hugging Face tokenizer: importing its class takes seconds


@dataclass(frozen=True)
class Prompt:
    """One prompt: its place in the source, its token ids, the reference answer if any, and where it is from."""

    index: int
    ids: tuple[int, ...]
    answer: str | None
    source: str


class PromptSource(Protocol):
    """Prompts by index. `size` is None where there is no end to them; then every index from 0 on is good."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int | None: ...

    def get(self, index: int) -> Prompt: ...

    def score(self, response_text: str, answer: str) -> bool: ...


# ---------------------------------------------------------------------------------------------------- sources


class LedgerSource:
    """Endless ledger problems. `stream` is "train" or, for evaluation, "held_out": streams never share their numbers.

    Raises:
        ConfigError: the tokenizer is not the ledger's.
    """

    name = Ledger.name
    size = None

    def __init__(self, tokenizer: Tokenizer, data: DataConfig, seed: int, *, stream: str = "train") -> None:
        if list(tokenizer.convert_tokens_to_ids(list(VOCABULARY))) != list(TOKEN_ID.values()):
            raise ConfigError(
                f"data.source = 'ledger' needs the ledger's tokenizer ({len(VOCABULARY)} words), the model has another "
                "one: take a model made by the sft recipes, or a .jsonl file of prompts"
            )
        self.task = Ledger(data.min_steps, data.max_steps)
        self.seed = seed
        self.stream = stream

    def get(self, index: int) -> Prompt:
        problem = self.task.problem(self.seed, index, self.stream)
        return Prompt(index, tuple(encode(problem.prompt_words)), problem.answer, self.name)

    def score(self, response_text: str, answer: str) -> bool:
        return self.task.score(response_text, answer)


class JsonlSource:
    r"""The rows of a JSON-lines file, read, checked and encoded at once, so that a bad row never meets a model.

    A row is an object with "prompt" (a string, encoded just as it is: no special tokens are added) or "messages" (chat
    turns, put through the tokenizer's chat template with the assistant's turn opened), and optionally "answer" (a
    string or a number) and "source" (a name for metrics; default: the file's). Other fields and blank lines are
    ignored. Answers are scored by math-verify on the last `\boxed{...}`.

    skip_bad_rows: leave out rows that are broken, empty, longer than `max_prompt_len` or not UTF-8; `skipped` has them.

    Raises:
        ConfigError: naming file and line of each bad row (the first few, and how many there are), unless they are
            skipped; or nothing is left.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        max_prompt_len: int | None = None,
        *,
        skip_bad_rows: bool = False,
    ) -> None:
        self.path = Path(path)
        self.name = self.path.name
        self._tokenizer = tokenizer
        self._max_prompt_len = max_prompt_len
        self.prompts: list[Prompt] = []
        self.lines: list[int] = []  # line number of each prompt, from 1
        self.skipped: dict[int, str] = {}  # line number of each bad row → what is wrong with it
        try:
            file = self.path.open("rb")  # in binary, so that only \n ends a line and a wrong encoding has a line number
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error.strerror}") from error
        with file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    self.prompts.append(self._prompt(line))
                    self.lines.append(number)
                except ConfigError as error:
                    self.skipped[number] = str(error)
        if self.skipped and not skip_bad_rows:
            raise ConfigError(self._refusal())
        if not self.prompts:
            bad = f" ({self.skipped_summary()})" if self.skipped else ""
            raise ConfigError(f"{self.path} has no prompts{bad}: give one JSON object a line")

    @property
    def size(self) -> int:
        return len(self.prompts)

    def get(self, index: int) -> Prompt:
        return self.prompts[index]

    def score(self, response_text: str, answer: str) -> bool:
        return math_equal(response_text, answer)

    def skipped_summary(self) -> str:
        """How many rows were bad, where, and the first reason."""
        lines = list(self.skipped)
        more = f" and {len(lines) - SHOWN_LINES} more" if len(lines) > SHOWN_LINES else ""
        where = ", ".join(map(str, lines[:SHOWN_LINES]))
        total = len(lines) + len(self.prompts)
        return f"{len(lines)} of {total} rows are bad, lines {where}{more} (line {lines[0]}: {self.skipped[lines[0]]})"

    def _refusal(self) -> str:
        """One line for each of the first bad rows; the last one counts them if there are several."""
        shown = list(self.skipped.items())[:SHOWN_LINES]
        problems = [f"{self.path}:{number}: {problem}" for number, problem in shown]
        if len(self.skipped) > 1:
            total = len(self.skipped) + len(self.prompts)
            problems.append(
                f"{self.path}: {len(self.skipped)} of {total} rows are bad: correct them, or leave them out with "
                "data.bad_rows=skip"
            )
        return "\n".join(problems)

    def _prompt(self, line: bytes) -> Prompt:
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise ConfigError(f'a row is an object such as {{"prompt": "..."}}, not {_excerpt(row)}')
        answer = row.get("answer")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
            raise ConfigError(f'"answer" = {_excerpt(answer)}: give a string or a number, or leave it out')
        source = row.get("source", self.path.stem)
        if not isinstance(source, str):
            raise ConfigError(f'"source" = {_excerpt(source)}: give a string, or leave it out')
        ids = self._encode(self._text(row))
        return Prompt(len(self.prompts), ids, None if answer is None else str(answer), source)

    def _text(self, row: dict[str, Any]) -> str:
        if ("prompt" in row) == ("messages" in row):
            both = "both" if "prompt" in row else "neither"
            raise ConfigError(f'the row has {both} of "prompt" (a string) and "messages" (chat turns): give one')
        if "prompt" in row:
            if not isinstance(row["prompt"], str) or not row["prompt"].strip():
                hint = ' (chat turns go under "messages")' if isinstance(row["prompt"], list) else ""
                raise ConfigError(f'"prompt" = {_excerpt(row["prompt"])}: give text that is not empty{hint}')
            return row["prompt"]
        messages = row["messages"]
        if not isinstance(messages, list) or not messages or not all(map(_is_chat_turn, messages)):
            raise ConfigError(
                f'"messages" = {_excerpt(messages)}: give a list of {{"role": "user", "content": "..."}}, none empty'
            )
        if not self._tokenizer.chat_template:
            raise ConfigError(
                '"messages" need a chat template, which the model\'s tokenizer lacks: give "prompt" instead'
            )
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of the model's author: it may raise what it likes
            raise ConfigError(f'the chat template does not take these "messages" ({error})') from error

    def _encode(self, text: str) -> tuple[int, ...]:
        try:
            ids = tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception as error:  # `tokenizers` has no class of its own for a word that is not in the vocabulary
            raise ConfigError(f"the model's tokenizer cannot encode the prompt {_excerpt(text)} ({error})") from error
        if not ids:
            raise ConfigError("the prompt is empty: the tokenizer makes no tokens of it")
        if self._max_prompt_len is not None and len(ids) > self._max_prompt_len:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens, rollout.max_prompt_len is {self._max_prompt_len}: "
                "remove the row or raise rollout.max_prompt_len"
            )
        return ids


def _is_chat_turn(turn: Any) -> bool:
    if not isinstance(turn, dict):
        return False
    role, content = turn.get("role"), turn.get("content")
    return isinstance(role, str) and isinstance(content, str) and bool(content.strip())


def _excerpt(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def make_source(data: DataConfig, tokenizer: Tokenizer, seed: int, max_prompt_len: int | None = None) -> PromptSource:
    """The source that `data.source` names: a procedural task (made with `seed`), or a path that ends in .jsonl.

    Raises:
        ConfigError: there is no such task or file, or a prompt does not fit `max_prompt_len`.
    """
    return _make_source(data, tokenizer, seed, max_prompt_len, stream="train")


def _make_source(
    data: DataConfig, tokenizer: Tokenizer, seed: int, max_prompt_len: int | None, *, stream: str
) -> LedgerSource | JsonlSource:
    if data.source == Ledger.name:
        source = LedgerSource(tokenizer, data, seed, stream=stream)
        longest = source.task.max_prompt_len
        if max_prompt_len is not None and longest > max_prompt_len:
            raise ConfigError(
                f"data.max_steps = {data.max_steps} makes prompts of up to {longest} tokens, rollout.max_prompt_len is "
                f"{max_prompt_len}: raise it to {longest}, or take data.max_steps <= {(max_prompt_len - 3) // 2}"
            )
        return source
    path = Path(data.source)
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise ConfigError(
                f"data.source = {data.source!r}: there is no such file (looked for {path.absolute()}): "
                "correct the path, or give 'ledger' for the built-in task"
            )
        return JsonlSource(path, tokenizer, max_prompt_len, skip_bad_rows=data.bad_rows == "skip")
    if path.is_file():
        raise ConfigError(f"data.source = {data.source!r} is not a .jsonl file: convert it to one JSON object a line")
    near = difflib.get_close_matches(data.source.lower(), PROCEDURAL_SOURCES, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"give {', '.join(map(repr, PROCEDURAL_SOURCES))}"
    raise ConfigError(f"data.source = {data.source!r} is not known: {remedy} (or a path that ends in .jsonl)")


def held_out(
    data: DataConfig, tokenizer: Tokenizer, seed: int, n: int, max_prompt_len: int | None = None
) -> list[Prompt]:
    """`n` evaluation problems with answers, the same ones for the same `seed`.

    Of a procedural task they come from a stream of their own, which no training run draws from, whatever its seed. A
    file is an evaluation set as it stands, so it must be another file than the training one: `n` of its rows, in file
    order, or all of them if there are fewer.

    Raises:
        ConfigError: as `make_source`, or a row has no answer.
    """
    source = _make_source(data, tokenizer, seed, max_prompt_len, stream="held_out")
    if source.size is None:
        return [source.get(index) for index in range(n)]
    missing = [line for prompt, line in zip(source.prompts, source.lines, strict=True) if prompt.answer is None]
    if missing:
        raise ConfigError(
            f'{source.path}:{missing[0]}: {len(missing)} of {source.size} rows have no "answer", so accuracy cannot be '
            "measured on this file: add the answers, or name an evaluation file (evaluation.sources)"
        )
    order = random_stream("held_out_choice", seed, 0).permutation(source.size)
    return [source.get(index) for index in sorted(order[:n].tolist())]


# ---------------------------------------------------------------------------------------------------- sampler


class PromptSampler:
    """Draws prompts in a fixed order: a function of the seed and of how many were drawn before, and of nothing else.

    An endless source is read from index 0 on. A finite one is read in epochs, each in its own order if `shuffle`; a
    batch may span two epochs, and every prompt comes once in each.
    """

    def __init__(self, source: PromptSource, seed: int, shuffle: bool = True) -> None:
        self.source = source
        self.seed = seed
        self.shuffle = shuffle
        self.consumed = 0
        self._order: tuple[int, Sequence[int]] = (-1, ())  # (epoch, its order): the last one used

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts."""
        drawn = range(self.consumed, self.consumed + n)
        prompts = [self.source.get(self._index(position)) for position in drawn]
        self.consumed = drawn.stop
        return prompts

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: plain JSON values."""
        return {"consumed": self.consumed} | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the sampler that `state` is from would have.

        Raises:
            ConfigError: the state belongs to another source, size, seed or order, so that no continuation is possible.
        """
        for name, now in self._identity().items():
            if state.get(name) != now:
                raise ConfigError(
                    f"the checkpoint's prompts had {name} = {state.get(name)!r}, this run has {now!r}: restore that "
                    "setting to resume, or start a new run"
                )
        self.consumed = int(state["consumed"])

    def _identity(self) -> dict[str, Any]:
        return {"source": self.source.name, "size": self.source.size, "seed": self.seed, "shuffle": self.shuffle}

    def _index(self, position: int) -> int:
        size = self.source.size
        if size is None:
            return position
        epoch, offset = divmod(position, size)
        if not self.shuffle:
            return offset
        if self._order[0] != epoch:
            order = random_stream("prompt_order", self.seed, epoch).permutation(size)
            self._order = (epoch, order.tolist())
        return self._order[1][offset]
