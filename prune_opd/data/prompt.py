"""A prompt, and what a source of prompts can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

Tokenizer = Any  # a Hugging Face tokenizer: importing its class takes seconds


@dataclass(frozen=True)
class Prompt:
    """One prompt: its index in the source, its token ids, the reference answer if any, and the source's name.

    teacher_ids: what the teacher reads in its place (`data.teacher_prompt`); None: the same.
    teacher: the name of its teacher, of several.
    """

    index: int
    ids: tuple[int, ...]
    answer: str | None
    source: str
    teacher_ids: tuple[int, ...] | None = None
    teacher: str = ""


class PromptSource(Protocol):
    """Prompts by index. `size` is None for an endless source, where every index from 0 on is valid."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int | None: ...

    def get(self, index: int) -> Prompt: ...

    def read(self, response_text: str) -> str | None:
        """The answer that a response gives; None if none can be read, which is never right."""
        ...

    def score(self, response_text: str, prompt: Prompt) -> bool:
        """Whether a response to a prompt of this source, which has an answer, is right."""
        ...
