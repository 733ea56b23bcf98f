"""Settings of the prompts. `config.py` re-exports them."""

from __future__ import annotations

from dataclasses import dataclass

from prune_opd.config_checks import between, one_of
from prune_opd.errors import ConfigError


@dataclass(frozen=True)
class DataConfig:
    """Where prompts come from and how rows of files become prompts (data/ has the formats)."""

    source: str = "ledger"  # ledger | reasoning_gym/TASK | a .jsonl or .parquet file | a dataset directory
    mixture: tuple[str, ...] = ()  # several sources instead, in the proportions of `weights`
    weights: tuple[float, ...] = ()  # of the mixture's sources; none: equal ones
    min_steps: int = 20  # ledger: bookings per problem
    max_steps: int = 40  # likewise, the most
    shuffle: bool = True  # a file's rows, in another order each epoch
    split: str | None = None  # of a dataset directory that has several; null: train
    chat: bool | None = None  # files: through the chat template; null: "messages", "problem", "question", not "prompt"
    system_prompt: str | None = None  # before the turns, where the chat template is used
    suffix: str = ""  # after the last user turn, or after the prompt
    thinking: bool | None = None  # the chat template's switch, where it has one
    bad_rows: str = "refuse"  # of a file: refuse (with their line numbers) | skip (and say how many, and where)

    def __post_init__(self) -> None:
        one_of("data.bad_rows", self.bad_rows, ("refuse", "skip"))
        between("data.min_steps", self.min_steps, 1, 40)
        between("data.max_steps", self.max_steps, self.min_steps, 40)
        if self.weights and len(self.weights) != len(self.mixture):
            raise ConfigError(
                f"data.weights has {len(self.weights)} numbers and data.mixture {len(self.mixture)} sources: give one "
                "weight for each source, or leave data.weights out"
            )
        if any(weight <= 0 for weight in self.weights):
            raise ConfigError(
                f"data.weights = {list(self.weights)}: every weight is above 0; leave a source out instead"
            )

        for name in ("chat", "system_prompt", "suffix", "thinking") if "ledger" in self.sources else ():
            if (value := getattr(self, name)) != getattr(DataConfig, name):
                raise ConfigError(f"data.{name} = {value!r}: the ledger's problems are complete texts; leave it out")

    @property
    def sources(self) -> tuple[str, ...]:
        """What the prompts are drawn from."""
        return self.mixture or (self.source,)
