"""A prompt, and what a source of prompts can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

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

    def score(self, response_text: str, prompt: Prompt) -> bool:
        """Whether a response to a prompt of this source, which has an answer, is right."""
        ...
