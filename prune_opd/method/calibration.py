"""What is usual for a pair: found in the first tokens of responses, over a run's first steps (ours; method.md §7).

No prefix has drifted there yet, so it is what these two models agree on by themselves. Gates judge by it instead of
by a constant. `change_point` looks for a fall below the usual acceptance (method/change_point.py); `overlap_quantile`
is the paper's gate with a γ of the pair's own, the overlap that at most `gate.quantile` of those tokens lie below;
`kl_agreement` (method/agreement.py) looks for a KL that stays a small share of the usual one, and takes that from the
run's last steps, as training brings it down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from prune_opd.config import GateConfig
from prune_opd.errors import ConfigError

LEAST_DEVIATION = 0.05  # of acceptance: two equal models would see a change in every rounding


class Usual(NamedTuple):
    """Agreement where nothing has drifted."""

    mean: float  # acceptance of a token
    deviation: float  # its standard deviation over tokens, at least LEAST_DEVIATION
    overlap: float = 0.0  # γ of the pair: at most `gate.quantile` of the tokens have less
    kl: float = 0.0  # mean reverse KL of a token [nats]


class Calibration:
    """Finds what is usual for a pair, in the first tokens of the responses of the first steps. Part of the checkpoint.

    Until a step has been taken there is nothing to compare with, and no event.
    """

    def __init__(self, gate: GateConfig | None) -> None:
        self._gate = gate if gate and gate.metric in ("change_point", "overlap_quantile", "kl_agreement") else None
        self._done = 0
        self._sums = (0.0, 0.0, 0.0)  # tokens, Σ a, Σ a²
        self._recent: list[tuple[float, float]] = []  # kl_agreement: tokens and Σ KL of the last steps
        self._counts: tuple[float, ...] = ()  # tokens by the number of ids that both models share, 0 to gate.k

    @property
    def usual(self) -> Usual | None:
        if self._gate is not None and self._gate.metric == "kl_agreement":
            early, kl = (sum(step[i] for step in self._recent) for i in range(2))
            return Usual(0.0, 0.0, kl=kl / early) if early else None
        tokens, total, squares = self._sums
        if self._gate is None or tokens == 0:
            return None
        mean = total / tokens
        deviation = math.sqrt(max(squares / tokens - mean**2, 0))
        return Usual(mean, max(deviation, LEAST_DEVIATION), self._own_threshold(self._gate))

    def _own_threshold(self, gate: GateConfig) -> float:
        shared, below = 0, 0.0
        for count in self._counts[: gate.k]:
            below += count
            if below > gate.quantile * self._sums[0]:
                break
            shared += 1
        # As one writes it, and rounded down: γ = .6666 lets 2 shared ids of 3 pass.
        return math.floor(1e4 * shared / gate.k + 1e-3) / 1e4

    def update(self, early: Sequence[float], kl: float = 0.0) -> None:
        """Take in a finished step, as `BatchStats.early` has it: of the first `gate.early_tokens` of its responses how
        many, Σ a and Σ a², and how many share 0, 1, … gate.k ids. kl: Σ KL over them, `early_kl`."""
        if self._gate is not None:
            self._recent = [*self._recent, (float(early[0]), kl)][-self._gate.calibration_steps :]
        if self._gate is not None and self._done < self._gate.calibration_steps:
            self._done += 1
            self._sums = tuple(a + b for a, b in zip(self._sums, early[:3], strict=True))  # type: ignore[assignment]
            counts = self._counts or (0.0,) * len(early[3:])
            self._counts = tuple(a + b for a, b in zip(counts, early[3:], strict=True))

    def record(self) -> dict[str, float]:
        """Its part of a step record: what the next step will be judged by."""
        usual = self.usual
        if usual is None or self._gate is None:
            return {}
        if self._gate.metric == "overlap_quantile":
            return {"usual_overlap": usual.overlap}
        if self._gate.metric == "kl_agreement":
            return {"usual_kl": usual.kl}
        return {"usual_acceptance": usual.mean, "usual_deviation": usual.deviation}

    def state_dict(self) -> dict[str, Any]:
        sums, counts, of = list(self._sums), list(self._counts), self._identity()
        return {"done": self._done, "sums": sums, "counts": counts, "recent": self._recent, "of": of}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint's state. ConfigError when a value is missing, or it is of another gate."""
        if self._gate is None:
            return
        now = self._identity()
        if (then := state.get("of", now)) != now or (self._gate.metric == "overlap_quantile" and "of" not in state):
            raise ConfigError(
                f"the checkpoint's gate calibration is of gate {then if 'of' in state else 'settings of before'}, this "
                f"run has {now}: restore those settings to resume, or start a new run"
            )
        try:
            self._done, self._sums = int(state["done"]), tuple(map(float, state["sums"]))  # type: ignore[assignment]
            self._counts = tuple(map(float, state.get("counts", ())))  # an older version's checkpoint has none
            self._recent = [(float(tokens), float(kl)) for tokens, kl in state.get("recent", ())]
        except KeyError as error:
            raise ConfigError(
                f"the checkpoint's gate calibration has no {error}: resume from another checkpoint"
            ) from None

    def _identity(self) -> dict[str, Any] | None:
        """The settings that what was found depends on."""
        gate = self._gate
        if gate is None:
            return None
        steps, early = gate.calibration_steps, gate.early_tokens
        return {"metric": gate.metric, "k": gate.k, "early_tokens": early, "calibration_steps": steps}


def in_force(gate: GateConfig | None, usual: Usual | None) -> GateConfig | None:
    """The gate that judges a step's tokens: for `overlap_quantile` overlap with the pair's γ, 0 before it is known."""
    if gate is None or gate.metric != "overlap_quantile":
        return gate
    return replace(gate, metric="overlap", threshold=usual.overlap if usual else 0.0)
