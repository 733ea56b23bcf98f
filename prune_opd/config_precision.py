"""Settings of number formats. `config.py` re-exports them."""

from __future__ import annotations

from dataclasses import dataclass

from prune_opd.config_checks import one_of


@dataclass(frozen=True)
class PrecisionConfig:
    params: str = "bf16"  # bf16 | fp32; the optimizer's master weights are always fp32
    fp8: str | None = None  # Transformer Engine on H100 only

    def __post_init__(self) -> None:
        one_of("precision.params", self.params, ("bf16", "fp32"))
        if self.fp8 is not None:
            one_of("precision.fp8", self.fp8, ("e4m3", "hybrid"))
