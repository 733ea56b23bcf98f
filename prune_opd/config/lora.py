"""Settings of low-rank adapters: the student's own weights stay as they are, and the adapters are trained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from prune_opd.config.checks import Checked, CountOrZero, Positive, Share
from prune_opd.errors import ConfigError

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
FEED_FORWARD = ("linear_fc1", "linear_fc2")
# Hugging Face's names of the same matrices.
OTHER_NAMES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "linear_qkv"),
    "o_proj": "linear_proj",
    **dict.fromkeys(("gate_proj", "up_proj"), "linear_fc1"),
    "down_proj": "linear_fc2",
}


@dataclass(frozen=True)
class LoraConfig(Checked, name="lora"):
    """Low-rank adapters on the student's linear layers (LoRA): y = W x + alpha / rank · B (A x), and W stays.

    B begins at 0, so the run begins at the student as it is. docs/lora.md.
    """

    rank: CountOrZero = 0  # rows of A and columns of B; 0: no adapters, every weight is trained
    alpha: Positive = 32.0  # an adapter counts alpha / rank times
    dropout: Share = 0.0  # 0 and nothing else: the student that is trained would not be the one that samples
    # layers that get an adapter, by megatron-core's names: linear_qkv (q, k and v with one A) | linear_proj (o) |
    # linear_fc1 (gate and up with one A) | linear_fc2 (down)
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout:
            raise ConfigError(
                f"lora.dropout = {self.dropout:g}: the student that is trained would not be the one that samples, and "
                "on-policy distillation is about that one; set lora.dropout=0"
            )
        for target in self.targets:
            if target not in TARGETS:
                meant = f" ({target} is a part of {OTHER_NAMES[target]})" if target in OTHER_NAMES else ""
                raise ConfigError(
                    f"lora.targets has {target!r}, and a layer has no such target{meant}: choose of "
                    f"{', '.join(TARGETS)}; embedding and output head stay as they are"
                )
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError(
                f"lora.targets = {list(self.targets)}: name each layer once, and one at least, or set lora.rank=0"
            )
        if not self.on and (idle := [field for field in ("alpha", "targets") if self._differs(field)]):
            raise ConfigError(
                f"lora.{idle[0]} = {getattr(self, idle[0])!r} does nothing with lora.rank = 0: leave it out, or set "
                "lora.rank=16"
            )

    def _differs(self, field: str) -> bool:
        defaults = {one.name: one.default for one in dataclasses.fields(self)}
        return bool(getattr(self, field) != defaults[field])

    @property
    def on(self) -> bool:
        return self.rank > 0

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


NO_LORA = LoraConfig()
