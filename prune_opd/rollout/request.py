"""What the engine is asked for: the rows of a batch, and how their tokens are sampled."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from prune_opd.data.prompt import Prompt
from prune_opd.rollout.batch import Response

CPU_BLOCK = 128  # tokens that vLLM's KV cache on a CPU is cut into; one of them stays empty
NOTHING = Response((), finished=False, logprobs=())  # what there is of a response before its first token


@dataclass(frozen=True)
class Row:
    """A response that is wanted.

    sample: its number among the responses to the prompt. limit: most tokens that it may have, those of `begun`
    included. begun: what earlier steps have left of it, it goes on after that. expected: tokens that are still to come,
    for who starts first and where; None: `limit`. repeat: how often the batch has had the same prompt before.
    """

    prompt: Prompt
    sample: int
    limit: int
    begun: Response = NOTHING
    expected: float | None = None
    repeat: int = 0

    @property
    def work(self) -> float:
        """Tokens that the engine has to expect of it."""
        return self.limit if self.expected is None else self.expected


@dataclass(frozen=True)
class TokenSampling:
    """How tokens are sampled. `seed` and `step` make a row's tokens; with `logprobs` those of the sampled ones come."""

    seed: int
    step: int
    temperature: float = 1.0
    top_p: float = 1.0
    logprobs: bool = False

    def seed_of(self, row: Row) -> int:
        """The sampler's seed of one response: the same whatever the batch, the order or the number of engines."""
        key = f"{self.seed}/{self.step}/{row.prompt.index}/{row.sample}" + (f"/{row.repeat}" if row.repeat else "")
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")


def new_rows(prompts: Sequence[Prompt], responses: int, max_tokens: int | Sequence[int]) -> list[Row]:
    """`responses` rows of each prompt, of at most `max_tokens` tokens: all alike, or one limit a row."""
    pairs = [(prompt, sample) for prompt in prompts for sample in range(responses)]
    limits = [max_tokens] * len(pairs) if isinstance(max_tokens, int) else max_tokens
    return [Row(prompt, sample, limit) for (prompt, sample), limit in zip(pairs, limits, strict=True)]


def cached_tokens(cache_gb: float, token_bytes: int) -> int:
    """Tokens of the longest sequence that a KV cache of `cache_gb` GiB on a CPU holds."""
    return max(int(cache_gb * 2**30) // (token_bytes * CPU_BLOCK) - 1, 0) * CPU_BLOCK


def told_apart(rows: Sequence[Row]) -> list[Row]:
    """The same rows with their `repeat`: a prompt that comes twice in a batch has two responses of its own.

    It does where a file has fewer prompts than a step takes, where a batch spans two epochs, or where a mixture names
    a file twice.
    """
    seen: Counter[tuple[int, int, tuple[int, ...]]] = Counter()
    found = []
    for row in rows:
        key = (row.prompt.index, row.sample, row.prompt.ids)
        found.append(replace(row, repeat=seen[key]) if seen[key] else row)
        seen[key] += 1
    return found
