"""What a rollout phase hands on: every response of the global batch, on every rank."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from prune_opd.data.prompt import Prompt


@dataclass(frozen=True)
class Response:
    """One sampled continuation. `finished`: it ended by itself (end-of-sequence), not at the horizon or by the gate.

    stopped: the in-flight gate cut it off. Such a response is not finished: nobody knows how it would have ended.
    """

    ids: tuple[int, ...]
    finished: bool
    logprobs: tuple[float, ...] | None = None  # the engine's, of the sampled tokens, when asked for
    stopped: bool = False
    dropped: int = 0  # tokens that came after the cut before it was decided


@dataclass(frozen=True)
class Rollouts:
    """B responses, grouped by prompt: row i belongs to prompts[i] (a prompt stands there once per response)."""

    prompts: tuple[Prompt, ...]
    responses: tuple[Response, ...]

    @property
    def prompt_ids(self) -> list[tuple[int, ...]]:
        return [prompt.ids for prompt in self.prompts]

    @property
    def response_ids(self) -> list[tuple[int, ...]]:
        return [response.ids for response in self.responses]

    @property
    def length_B(self) -> list[int]:
        """Response tokens of each row, the end-of-sequence token included."""
        return [len(response.ids) for response in self.responses]

    @property
    def row_length_B(self) -> list[int]:
        """Tokens of each row that go through a model: prompt and response, whose last token predicts nothing."""
        return [
            len(prompt.ids) + len(response.ids) - 1
            for prompt, response in zip(self.prompts, self.responses, strict=True)
        ]

    @property
    def finished_B(self) -> list[bool]:
        return [response.finished for response in self.responses]

    @property
    def stopped_rows(self) -> list[int]:
        return [row for row, response in enumerate(self.responses) if response.stopped]

    @property
    def tokens(self) -> int:
        return sum(self.length_B)

    @property
    def digest(self) -> str:
        """A short hash of every response token, in row order: equal for equal rollouts, whatever made them."""
        return hashlib.blake2b(repr(self.response_ids).encode(), digest_size=8).hexdigest()
