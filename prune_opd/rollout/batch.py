"""What the rollout phase returns: every response of the global batch, on every rank."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from prune_opd.data.prompt import Prompt


@dataclass(frozen=True)
class Response:
    """One sampled continuation.

    finished: it ended by itself (end-of-sequence), not at the horizon or by the gate.
    stopped: the in-flight gate cut it off. Such a response is not finished: nobody knows how it would have ended.
    stale: how many tokens at its start an earlier step has sampled, from an older student (`rollout.partial`,
    `rollout.refresh_every`).
    """

    ids: tuple[int, ...]
    finished: bool
    logprobs: tuple[float, ...] | None = None  # the engine's, of the sampled tokens, when asked for
    stopped: bool = False
    dropped: int = 0  # tokens that came after the cut before it was decided
    stale: int = 0
    engine: int = field(default=0, compare=False)  # number of the rollout engine that sampled its last tokens

    @property
    def fresh(self) -> int:
        """Tokens of this step."""
        return len(self.ids) - self.stale

    def ended(self, limit: int) -> bool:
        """Whether it is complete if it may have `limit` tokens."""
        return self.finished or self.stopped or len(self.ids) >= limit


@dataclass(frozen=True)
class Group:
    """A prompt with its responses. `begun`: what they have from earlier steps; empty for a new group."""

    prompt: Prompt
    begun: tuple[Response, ...] = ()


@dataclass(frozen=True)
class Rollouts:
    """B responses, grouped by prompt: row i belongs to prompts[i] (a prompt stands there once per response).

    left: groups that were started as well, but were not complete when enough others were (`rollout.oversample`), or
    that the next steps train on (`rollout.refresh_every`).
    """

    prompts: tuple[Prompt, ...]
    responses: tuple[Response, ...]
    left: tuple[Group, ...] = ()

    def split(self, kept: Sequence[int], responses: int) -> Rollouts:
        """The rows of the prompts number `kept`; the other prompts become `left`. responses: rows of each prompt."""
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
    def teacher_prompt_ids(self) -> list[tuple[int, ...]]:
        """What the teacher reads before each response."""
        return [prompt.ids if prompt.teacher_ids is None else prompt.teacher_ids for prompt in self.prompts]

    @property
    def hinted(self) -> bool:
        """Whether the teacher reads another prompt than the student before any response."""
        return any(prompt.teacher_ids not in (None, prompt.ids) for prompt in self.prompts)

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
        return self._with_responses(self.prompt_ids)

    @property
    def teacher_row_length_B(self) -> list[int]:
        """Tokens of each row that go through the teacher, which may read a longer prompt."""
        return self._with_responses(self.teacher_prompt_ids)

    def _with_responses(self, prompts: Sequence[tuple[int, ...]]) -> list[int]:
        return [len(ids) + len(response.ids) - 1 for ids, response in zip(prompts, self.responses, strict=True)]

    @property
    def teacher_B(self) -> list[str]:
        """The name of each row's teacher; "" where there is one for all."""
        return [prompt.teacher for prompt in self.prompts]

    @property
    def finished_B(self) -> list[bool]:
        return [response.finished for response in self.responses]

    @property
    def stopped_rows(self) -> list[int]:
        return [row for row, response in enumerate(self.responses) if response.stopped]

    @property
    def stale_logprobs_B(self) -> list[tuple[float, ...]]:
        """The log-probabilities with which each row's stale tokens were sampled; these are the row's first tokens."""
        return [(response.logprobs or ())[: response.stale] for response in self.responses]

    @property
    def fresh_logprobs_B(self) -> list[tuple[float, ...]] | None:
        """The engine's log-probabilities of each row's tokens, NaN for stale ones; None if they were not asked for."""
        if any(response.logprobs is None for response in self.responses):
            return None
        return [
            (math.nan,) * response.stale + (response.logprobs or ())[response.stale :] for response in self.responses
        ]

    @property
    def engine_B(self) -> list[int]:
        return [response.engine for response in self.responses]

    @property
    def tokens(self) -> int:
        return sum(self.length_B)

    @property
    def generated(self) -> int:
        """Tokens generated in this step, in groups that were left too."""
        return sum(response.fresh for response in self.responses) + self.left_tokens

    @property
    def left_tokens(self) -> int:
        return sum(response.fresh for group in self.left for response in group.begun)

    @property
    def digest(self) -> str:
        """A short hash of every response token, in row order: equal for equal rollouts, whatever made them."""
        return hashlib.blake2b(repr(self.response_ids).encode(), digest_size=8).hexdigest()

    def record(self) -> dict[str, Any]:
        """The rollouts' part of a step record."""
        return {
            "response_length": self.tokens / len(self.responses),
            "finished_rate": sum(self.finished_B) / len(self.responses),
            "rollout_digest": self.digest,
            "tokens_generated": self.generated,
            **({"teacher_prompt_length": fmean(map(len, self.teacher_prompt_ids))} if self.hinted else {}),
        }
