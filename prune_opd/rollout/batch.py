"""What a rollout phase hands on: every response of the global batch, on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from prune_opd.data.prompt import Prompt


@dataclass(frozen=True)
class Response:
    """One sampled continuation. `finished`: it ended by itself (end-of-sequence), not at the horizon or by the gate.

    stopped: the in-flight gate cut it off. Such a response is not finished: nobody knows how it would have ended.
    stale: tokens at its start that an earlier step has sampled, from an older student (`rollout.partial`).
    """

    ids: tuple[int, ...]
    finished: bool
    logprobs: tuple[float, ...] | None = None  # the engine's, of the sampled tokens, when asked for
    stopped: bool = False
    dropped: int = 0  # tokens that came after the cut before it was decided
    stale: int = 0

    @property
    def fresh(self) -> int:
        """Tokens of this step."""
        return len(self.ids) - self.stale

    def ended(self, limit: int) -> bool:
        """Whether nothing is to be generated of it, if it may have `limit` tokens."""
        return self.finished or self.stopped or len(self.ids) >= limit


@dataclass(frozen=True)
class Group:
    """A prompt to be answered; `begun`: what earlier steps have left of its responses, empty for a new one."""

    prompt: Prompt
    begun: tuple[Response, ...] = ()


@dataclass(frozen=True)
class Rollouts:
    """B responses, grouped by prompt: row i belongs to prompts[i] (a prompt stands there once per response).

    left: the groups that were started too and were not complete when enough others were (`rollout.oversample`).
    """

    prompts: tuple[Prompt, ...]
    responses: tuple[Response, ...]
    left: tuple[Group, ...] = ()

    def split(self, kept: Sequence[int], responses: int) -> Rollouts:
        """These prompts' rows, and the other prompts as groups that are left; `responses` rows a prompt."""
        groups = [
            Group(self.prompts[first], self.responses[first : first + responses])
            for first in range(0, len(self.prompts), responses)
        ]
        wanted = set(kept)
        return Rollouts(
            tuple(groups[i].prompt for i in kept for _ in range(responses)),
            tuple(response for i in kept for response in groups[i].begun),
            tuple(group for i, group in enumerate(groups) if i not in wanted),
        )

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
    def stale_logprobs_B(self) -> list[tuple[float, ...]]:
        """Of each row's stale tokens, which come first: the log-probabilities that they were sampled with."""
        return [(response.logprobs or ())[: response.stale] for response in self.responses]

    @property
    def tokens(self) -> int:
        return sum(self.length_B)

    @property
    def generated(self) -> int:
        """Tokens of this step, those of the groups that were left included."""
        return sum(response.fresh for response in self.responses) + self.left_tokens

    @property
    def left_tokens(self) -> int:
        return sum(response.fresh for group in self.left for response in group.begun)

    @property
    def digest(self) -> str:
        """A short hash of every response token, in row order: equal for equal rollouts, whatever made them."""
        return hashlib.blake2b(repr(self.response_ids).encode(), digest_size=8).hexdigest()
