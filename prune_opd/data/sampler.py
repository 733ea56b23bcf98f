"""Which prompts come next: a function of the seed and of how many were drawn, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from prune_opd.data.ledger import random_stream
from prune_opd.data.prompt import Prompt, PromptSource
from prune_opd.errors import ConfigError


class Sampler(Protocol):
    """Where training gets its prompts."""

    @property
    def source(self) -> PromptSource: ...

    @property
    def endless(self) -> bool:
        """Whether no prompt ever comes again."""

    def next(self, n: int) -> list[Prompt]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class PromptSampler:
    """Draws prompts in a fixed order: a function of the seed and of how many were drawn before, and of nothing else.

    An endless source is read from index 0 on. A finite one is read in epochs, each in its own order if `shuffle`; a
    batch may span two epochs, and every prompt comes once in each.

    finish: what is done to each prompt that is drawn.
    """

    def __init__(
        self,
        source: PromptSource,
        seed: int,
        shuffle: bool = True,
        finish: Callable[[Prompt], Prompt] = lambda prompt: prompt,
    ) -> None:
        self.source, self.finish = source, finish
        self.seed = seed
        self.shuffle = shuffle
        self.consumed = 0
        self._order: tuple[int, Sequence[int]] = (-1, ())  # (epoch, its order): the last one used

    @property
    def endless(self) -> bool:
        return self.source.size is None

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts."""
        drawn = range(self.consumed, self.consumed + n)
        prompts = [self.finish(self.source.get(self._index(position))) for position in drawn]
        self.consumed = drawn.stop
        return prompts

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: plain JSON values."""
        return {"consumed": self.consumed} | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ConfigError: the state is of another source, size, seed or order, so that it cannot be continued.
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


class MixtureSampler:
    """Draws from several sources in fixed proportions, each in an order of its own.

    Nothing is random: the next prompt comes from the source that is farthest behind its share (in a tie the first one).
    So every batch is as near to the proportions as whole prompts allow.

    Args:
        weights: one for each source, above 0; they need not add up to 1.
    """

    def __init__(self, samplers: Sequence[PromptSampler], weights: Sequence[float]) -> None:
        self.samplers = list(samplers)
        self.weights = [weight / sum(weights) for weight in weights]

    @property
    def source(self) -> PromptSource:
        """The first source, for a caller who needs any prompt."""
        return self.samplers[0].source

    @property
    def endless(self) -> bool:
        return all(sampler.endless for sampler in self.samplers)

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts."""
        return [self._next() for _ in range(n)]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: plain JSON values."""
        return {"weights": self.weights, "sources": [sampler.state_dict() for sampler in self.samplers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`. ConfigError: see `PromptSampler`."""
        if state.get("weights") != self.weights or len(state.get("sources", ())) != len(self.samplers):
            raise ConfigError(
                f"the checkpoint's prompts had the weights {state.get('weights')}, this run has {self.weights}: "
                "restore data.mixture and data.weights to resume, or start a new run"
            )
        for sampler, of_source in zip(self.samplers, state["sources"], strict=True):
            sampler.load_state_dict(of_source)

    def _next(self) -> Prompt:
        drawn = [sampler.consumed for sampler in self.samplers]
        behind = [weight * (sum(drawn) + 1) - count for weight, count in zip(self.weights, drawn, strict=True)]
        return self.samplers[behind.index(max(behind))].next(1)[0]
