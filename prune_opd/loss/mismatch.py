"""How far the rollout engines are from the trainer on the tokens of a step, engine by engine (method/mismatch.py)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from prune_opd.method.mismatch import log_ratio

SUMS = ("mean", "k3", "ratio_mean", "outside")  # means over tokens; `max` beside them


class Mismatch:
    """Sums over the sampled tokens of each row: |Δ|, k3, ρ, whether ρ is unusual, tokens; and the largest |Δ|.

    logprobs_B: the engine's log-probabilities of each row's tokens, NaN where they do not count (stale tokens).
    engine_B: the engine of each row. bounds: least and largest usual ρ.
    """

    def __init__(
        self,
        logprobs_B: Sequence[Sequence[float]],
        engine_B: Sequence[int],
        bounds: tuple[float, float],
        device: torch.device,
    ) -> None:
        self.logprobs_B, self.engine_B, self.bounds = logprobs_B, engine_B, bounds
        self.sums_B6 = torch.zeros(len(engine_B), 6, dtype=torch.float64, device=device)

    def add(self, rows: Sequence[int], length_B: Tensor, logp_N: Tensor) -> None:
        """Take in one micro-batch: the trainer's log-probabilities of the tokens of `rows`, end to end."""
        device = self.sums_B6.device
        engine_logp_N = torch.tensor(
            list(chain.from_iterable(self.logprobs_B[row] for row in rows)), dtype=torch.float64, device=device
        )
        row_N = torch.tensor(list(rows), dtype=torch.int64, device=device)
        row_N = row_N.repeat_interleave(length_B, output_size=len(engine_logp_N))
        delta_N = log_ratio(logp_N, engine_logp_N)
        known_N = ~delta_N.isnan()
        delta_N = delta_N.where(known_N, 0)
        ratio_N, (low, high) = delta_N.clamp(-20, 20).exp(), self.bounds
        outside_N = (ratio_N < low) | (ratio_N > high)
        parts = [delta_N.abs(), ratio_N - 1 - delta_N, ratio_N * known_N, outside_N & known_N, known_N]
        self.sums_B6[:, :5].index_add_(0, row_N, torch.stack([part.double() for part in parts], dim=1))
        self.sums_B6[:, 5].scatter_reduce_(0, row_N, delta_N.abs(), reduce="amax")

    def worst(self) -> tuple[int, float] | None:
        """The engine with the largest mean |Δ| and that mean [nats]; None if no token is known."""
        means = {engine: found["mean"] for engine, found in self._by_engine().items() if found["mean"] is not None}
        return max(means.items(), key=lambda item: item[1]) if means else None

    def record(self) -> dict[str, float | list[float | None] | None]:
        """The mismatch's part of a step record: of all tokens, and a list with a number for each engine."""
        whole, by_engine = self._figures(self.sums_B6), self._by_engine()
        together = {f"mismatch_{name}": value for name, value in whole.items()}
        apart = {f"mismatch_{name}_by_engine": [found[name] for found in by_engine.values()] for name in whole}
        return {**together, **apart}

    def _by_engine(self) -> dict[int, dict[str, float | None]]:
        engine_B = torch.tensor(list(self.engine_B), device=self.sums_B6.device)
        engines = range(max(self.engine_B, default=-1) + 1)
        return {engine: self._figures(self.sums_B6[engine_B == engine]) for engine in engines}

    @staticmethod
    def _figures(sums_B6: Tensor) -> dict[str, float | None]:
        """Of these rows; None where they have no token that counts."""
        *sums, tokens = sums_B6[:, :5].sum(0).tolist()
        names = (*SUMS, "max")
        if not tokens:
            return dict.fromkeys(names)
        return dict(zip(names, [*(total / tokens for total in sums), float(sums_B6[:, 5].max())], strict=True))
