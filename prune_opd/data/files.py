"""Prompts from a file or a dataset directory."""

from __future__ import annotations

from pathlib import Path

from prune_opd.config import DataConfig
from prune_opd.data.answers import math_equal
from prune_opd.data.extract import read_answer
from prune_opd.data.hint import hint_limit, with_hint
from prune_opd.data.prompt import Prompt, Tokenizer
from prune_opd.data.render import (
    SettingError,
    answer_of,
    encode_text,
    ends_with_an_answer,
    excerpt,
    prompt_text,
    written,
)
from prune_opd.data.rows import Row, read_rows
from prune_opd.errors import ConfigError

SHOWN_ROWS = 10  # bad rows of a file that are named one by one


class FileSource:
    r"""The rows of a file (rows.py), all read, checked and encoded at the start, so that no bad row reaches a model.

    A row has a prompt (render.py) and optionally "answer" (a string or a number) and "source" (a name for metrics;
    default: the file's), and what `data.teacher_prompt` names (hint.py). Other columns are ignored. No special tokens
    are added. Answers are read as `extract` says
    (extract.py) and scored by math-verify.

    data: its `source` is the file; bad_rows=skip leaves out rows that are broken, empty, longer than `max_prompt_len`
    or not UTF-8; `skipped` has them.

    Raises:
        ConfigError: there are bad rows that are not to be skipped (it names the first ones, and how many there are; a
            setting that rows have no place for once, with their number), or no row is left.
    """

    def __init__(
        self, data: DataConfig, tokenizer: Tokenizer, max_prompt_len: int | None = None, *, extract: str = "box"
    ) -> None:
        self.path = Path(data.source)
        self.name = self.path.name
        self._data, self._tokenizer, self._max_prompt_len = data, tokenizer, max_prompt_len
        self._extract = extract
        self.prompts: list[Prompt] = []
        self.places: list[str] = []  # file:row of each prompt, rows from 1
        self.answered = 0  # rows that end with the assistant's answer, which is no part of the prompt
        self.skipped: dict[str, str] = {}  # file:row of each bad row → what is wrong with it
        of_settings: set[str] = set()  # what is wrong and is no row's fault
        for file, number, row in read_rows(self.path, data.split):
            place = f"{file}:{number}"
            try:
                self.prompts.append(self._prompt(row))
                self.places.append(place)
                self.answered += not isinstance(row, ConfigError) and ends_with_an_answer(row)
            except ConfigError as error:
                self.skipped[place] = str(error)
                if isinstance(error, SettingError):
                    of_settings.add(str(error))
        if self.skipped and data.bad_rows == "refuse":
            raise ConfigError(self._refusal(of_settings))
        if not self.prompts:
            bad = f" ({self.skipped_summary()})" if self.skipped else ""
            raise ConfigError(f"{self.path} has no prompts{bad}: give one JSON object a line")

    @property
    def size(self) -> int:
        return len(self.prompts)

    def get(self, index: int) -> Prompt:
        return self.prompts[index]

    def read(self, response_text: str) -> str | None:
        return read_answer(response_text, self._extract)

    def score(self, response_text: str, prompt: Prompt) -> bool:
        assert prompt.answer is not None
        given = self.read(response_text)
        return given is not None and math_equal(given, prompt.answer)

    def need_answers(self, why: str, otherwise: str) -> None:
        """ConfigError if a row has no answer, with what that hinders and what else can be done."""
        missing = [place for prompt, place in zip(self.prompts, self.places, strict=True) if prompt.answer is None]
        if missing:
            raise ConfigError(
                f'{missing[0]}: {len(missing)} of {self.size} rows have no "answer", so {why}: '
                f"add the answers, {otherwise}"
            )

    def notes(self) -> list[str]:
        """What is to be said of the file: rows that are left out, and turns."""
        found = [f"{self.path}: {self.skipped_summary()}"] if self.skipped else []
        if self.answered:
            found.append(
                f"{self.path}: {self.answered} of {self.size} rows end with an assistant's turn: it is taken for the "
                "answer, and left out of the prompt"
            )
        return found

    def skipped_summary(self) -> str:
        """How many rows were bad, where, and the first reason."""
        places = list(self.skipped)
        more = f" and {len(places) - SHOWN_ROWS} more" if len(places) > SHOWN_ROWS else ""
        where = ", ".join(place.rpartition(":")[2] for place in places[:SHOWN_ROWS])
        total = len(places) + len(self.prompts)
        first = places[0].rpartition(":")[2]
        return f"{len(places)} of {total} rows are bad, lines {where}{more} (line {first}: {self.skipped[places[0]]})"

    def _refusal(self, of_settings: set[str]) -> str:
        """One line for each setting and each of the first bad rows; the last one counts those if there are several."""
        total, problems = len(self.skipped) + len(self.prompts), []
        for problem in sorted(of_settings):
            places = [place for place, found in self.skipped.items() if found == problem]
            problems.append(f"{places[0]}: {problem} (so in {len(places)} of {total} rows)")
        bad = [f"{place}: {problem}" for place, problem in self.skipped.items() if problem not in of_settings]
        problems += bad[:SHOWN_ROWS]
        if len(bad) > 1:
            problems.append(
                f"{self.path}: {len(bad)} of {total} rows are bad: correct them, or leave them out with "
                "data.bad_rows=skip"
            )
        return "\n".join(problems)

    def _prompt(self, row: Row | ConfigError) -> Prompt:
        if isinstance(row, ConfigError):
            raise row
        source = row.get("source")
        source = self.path.stem if source is None else source
        if not isinstance(source, str):
            raise ConfigError(f'"source" = {excerpt(source)}: give a string, or leave it out')
        written("source", source)
        answer, ids = answer_of(row), self._encode(prompt_text(row, self._data, self._tokenizer))
        prompt = Prompt(len(self.prompts), ids, answer, source, teacher=self._teacher(row))
        return with_hint(prompt, row, self._data, self._tokenizer, hint_limit(self._data, self._max_prompt_len))

    def _teacher(self, row: Row) -> str:
        column = self._data.teacher_column
        named = None if column is None else row.get(column)
        if not isinstance(named, str | None):
            raise ConfigError(f'"{column}" = {excerpt(named)}: give the name of a teacher, or leave it out')
        return named or ""

    def _encode(self, text: str) -> tuple[int, ...]:
        ids = encode_text(text, self._tokenizer)
        if self._max_prompt_len is not None and len(ids) > self._max_prompt_len:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens, rollout.max_prompt_len is {self._max_prompt_len}: "
                "remove the row or raise rollout.max_prompt_len"
            )
        return ids
