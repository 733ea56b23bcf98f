"""The horizon: how many response tokens the next rollout batch may have (method.md §3).

Four controllers answer that question: full rollouts; TOPD's fixed and POPD's growing truncation (arXiv 2605.31490;
"TOPD" is truncated OPD here, never the trajectory-aware OPD of arXiv 2606.00305); and Prune-OPD's window, which follows
how far responses stay reliable (arXiv 2605.07804 §3.3). One is ours: a window that weighs reliable tokens against
generated ones. Two are rivals', in our reading: ADWIN's probes and the plateaus of Adaptive FastOPD. All have these:

    controller = make_controller(config)
    controller.horizon                                             tokens, for the next batch
    controller.update(reliable_length_B, length_B, finished_B)     once after each step
    controller.state_dict() / .load_state_dict(state)              part of the checkpoint

An update looks at the whole global batch, so every rank that makes it reaches the same horizon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol

from prune_opd.config import HorizonConfig
from prune_opd.errors import ConfigError


class HorizonController(Protocol):
    """What the training loop knows of a controller."""

    @property
    def horizon(self) -> int:
        """Response tokens that the next rollout batch may have."""

    def update(self, reliable_length_B: Iterable[Any], length_B: Iterable[Any], finished_B: Iterable[Any]) -> None:
        """Take in one finished step. The three run over the B responses of the global batch (sequences or tensors).

        reliable_length_B: E_i, tokens with R > 0 (gate.py). length_B: response tokens. finished_B: whether the response
        ended by itself, rather than at the horizon or by the in-flight gate. ValueError when their lengths differ.
        """

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on as if it had never stopped; plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint's state. ConfigError when another strategy wrote it or a value is missing."""


class FixedHorizon:
    """full: `max_len` always. TOPD: H = ρ · max_len, rounded down, at least 1 token."""

    def __init__(self, config: HorizonConfig) -> None:
        self._strategy = config.strategy
        if config.strategy == "topd":
            assert config.rho is not None  # HorizonConfig has seen to it
            # ρ as the decimal that was written: in floats 0.29 · 100 is 28.999….
            self._horizon = max(1, math.floor(Fraction(str(config.rho)) * config.max_len))
        else:
            self._horizon = config.max_len

    @property
    def horizon(self) -> int:
        return self._horizon

    def update(self, reliable_length_B: Iterable[Any], length_B: Iterable[Any], finished_B: Iterable[Any]) -> None:
        _rows(reliable_length_B, length_B, finished_B)

    def state_dict(self) -> dict[str, Any]:
        return {"strategy": self._strategy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _own_state(state, self._strategy)


class ProgressiveHorizon:
    """POPD: H_s = min(max_len, H_0 + ΔH · ⌊s / Δs⌋), s = steps taken so far."""

    def __init__(self, config: HorizonConfig) -> None:
        self._config = config
        self._step = 0

    @property
    def horizon(self) -> int:
        config = self._config
        assert config.init_len is not None and config.increment is not None and config.interval is not None
        return min(config.max_len, config.init_len + config.increment * (self._step // config.interval))

    def update(self, reliable_length_B: Iterable[Any], length_B: Iterable[Any], finished_B: Iterable[Any]) -> None:
        _rows(reliable_length_B, length_B, finished_B)
        self._step += 1

    def state_dict(self) -> dict[str, Any]:
        return {"strategy": "popd", "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _own_state(state, "popd", "step")
        self._step = int(state["step"])


class _Window:
    """A window M that moves between min_len and max_len."""

    def __init__(self, config: HorizonConfig) -> None:
        assert config.init_len is not None  # HorizonConfig has seen to it
        self._config = config
        self._window = self._inside(config.init_len)

    @property
    def horizon(self) -> int:
        return self._window

    def _inside(self, window: int) -> int:
        return min(max(window, self._config.min_len), self._config.max_len)


class PruneHorizon(_Window):
    """Prune-OPD: the window M grows while enough responses stay reliable up to it, and shrinks when they do not.

        boundary = max(min_len, M − margin);  h = mean_i 1[E_i ≥ boundary]
        h ≥ hit_ratio: M ← min(M + step, max_len), c ← 0
        else:          c ← c + 1;  at c = patience: M ← max(M − step, min_len), c ← 0

    `finished_rows` settles what a response counts as that ended by itself before the boundary, though nothing drifted:
    `miss` is the paper's; `hit_if_reliable` takes it as a hit if it was reliable to its end (E_i ≥ length_i); `exclude`
    leaves it out of the mean, and a step from which nothing is left changes neither M nor c.
    """

    _misses = 0  # in a row

    def update(self, reliable_length_B: Iterable[Any], length_B: Iterable[Any], finished_B: Iterable[Any]) -> None:
        config = self._config
        boundary = max(config.min_len, self._window - config.margin)
        hits = rows = 0
        for reliable_length, length, finished in _rows(reliable_length_B, length_B, finished_B):
            if config.finished_rows == "exclude" and finished and length < boundary:
                continue
            reliable_to_its_end = bool(finished) and reliable_length >= length
            rows += 1
            hits += reliable_length >= boundary or (config.finished_rows == "hit_if_reliable" and reliable_to_its_end)
        if rows == 0:
            return
        if hits / rows >= config.hit_ratio:
            self._window, self._misses = self._inside(self._window + config.step), 0
            return
        self._misses += 1
        if self._misses >= config.patience:
            self._window, self._misses = self._inside(self._window - config.step), 0

    def state_dict(self) -> dict[str, Any]:
        return {"strategy": "prune", "window": self._window, "misses": self._misses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _own_state(state, "prune", "window", "misses")
        # A resumed run may have been given tighter limits.
        self._window, self._misses = self._inside(int(state["window"])), int(state["misses"])


class MarginalHorizon(_Window):
    """Ours: the window goes to where further tokens stop being worth their price.

    Prune-OPD's window stays as long as its luckiest `hit_ratio` of the responses are reliable there, whatever the
    others cost. This one asks what the batch as a whole gains. The value of a window w is

        V(w) = Σ_i min(E_i, w) − price · Σ_i min(length_i, w)        reliable tokens, less the price of all tokens

    so V rises at w where more than `price` of the responses that are still running are reliable. With w* ≤ M the
    largest w of the greatest V, the window moves towards w* + margin, at most `step` at a time; a batch that is worth
    its price to its end (w* = M) says nothing about what lies behind, so M grows by `step`. A response that ended by
    itself costs and gains nothing beyond its end, so short answers do not close the window.
    """

    def update(self, reliable_length_B: Iterable[Any], length_B: Iterable[Any], finished_B: Iterable[Any]) -> None:
        config, window = self._config, self._window
        rows = [(reliable, length) for reliable, length, _ in _rows(reliable_length_B, length_B, finished_B)]

        if not rows:
            return
        best = self._best(rows, window)
        target = window + config.step if best == window else best + config.margin
        self._window = self._inside(max(window - config.step, min(target, window + config.step)))

    def _best(self, rows: Sequence[tuple[Any, Any]], window: int) -> int:
        """The largest w ≤ window of the greatest V. rows: reliable length and length of each response."""

        def value(w: int) -> float:
            paid = sum(min(length, w) for _, length in rows)
            return sum(min(reliable, w) for reliable, _ in rows) - self._config.price * paid

        # V is linear between the lengths that occur, so its maximum is at one of them.
        places = {int(place) for row in rows for place in row if place < window} | {window}
        return max(sorted(places, reverse=True), key=value)

    def state_dict(self) -> dict[str, Any]:
        return {"strategy": "marginal", "window": self._window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _own_state(state, "marginal", "window")
        self._window = self._inside(int(state["window"]))


class AdwinHorizon(MarginalHorizon):
    """ADWIN: short windows, and now and then a full-length probe that says how short they may be.

    "ADWIN: Adaptive Windows for Horizon-Aware On-Policy Distillation", arXiv 2605.28396 (the abstract was read; not the
    change detector of that name): it trains on short prefixes, "using delayed full-rollout probes to audit prefix–full
    alignment and adapt the next horizon with staleness control". Ours: the first and then every `probe_every`-th batch
    has `max_len`; the audit is not of gradients but of reliable lengths, by the value V of `MarginalHorizon` along the
    whole responses; the window goes to w* + margin at once, and staleness is bounded by the next probe alone.
    """

    def __init__(self, config: HorizonConfig) -> None:
        self._config, self._window, self._step = config, config.max_len, 0

    @property
    def horizon(self) -> int:
        return self._config.max_len if self._probes else self._window

    @property
    def _probes(self) -> bool:
        return self._step % self._config.probe_every == 0

    def update(self, reliable_length_B: Iterable[Any], length_B: Iterable[Any], finished_B: Iterable[Any]) -> None:
        rows = [(reliable, length) for reliable, length, _ in _rows(reliable_length_B, length_B, finished_B)]
        if self._probes and rows:
            self._window = self._inside(self._best(rows, self._config.max_len) + self._config.margin)
        self._step += 1

    def state_dict(self) -> dict[str, Any]:
        return {"strategy": "adwin", "window": self._window, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _own_state(state, "adwin", "window", "step")
        self._window, self._step = self._inside(int(state["window"])), int(state["step"])


class PlateauHorizon(_Window):
    """Adaptive FastOPD: the window grows where nothing improves any more near its end, and never shrinks.

    "Adaptive FastOPD: Progress-Aware Rollout Horizon Expansion", arXiv 2607.29494 (the abstract and summaries were
    read): it expands when learning near the boundary has come to a plateau, by four teacher-student signals measured
    relative to their values upon entering the horizon, and the horizon is used enough, so that a few long responses do
    not decide. Ours: the signals are overlap, the teacher's mass on the student's candidates, the mean of
    log p(y) − log q(y) and its root mean square, over the last `margin` tokens of the window (`BatchStats.near`);
    a plateau are `patience` steps in a row in which none gets further from its first value than before, by more than
    `tolerance` of that value; used enough is a share of `hit_ratio` of the responses that reach the window's end.
    """

    def __init__(self, config: HorizonConfig) -> None:
        super().__init__(config)
        self._seen: list[float] | None = None  # the signals of the step that the next update is of
        self._enter()

    def _enter(self) -> None:
        self._first: list[float] = []
        self._furthest: list[float] = []
        self._still = 0  # steps in a row

    @property
    def margin(self) -> int:
        """Tokens before the window's end that are watched."""
        return self._config.margin

    def see(self, signals: Mapping[str, float] | None) -> None:
        """The step's signals near the window's end, before its `update`; None if no token fell there."""
        self._seen = None if signals is None else list(signals.values())

    def update(self, reliable_length_B: Iterable[Any], length_B: Iterable[Any], finished_B: Iterable[Any]) -> None:
        config, seen = self._config, self._seen
        rows = _rows(reliable_length_B, length_B, finished_B)
        if seen is None or not rows:
            return
        if not self._first:
            self._first, self._furthest = seen, [0.0] * len(seen)
            return
        moved = [abs(now - first) / max(abs(first), 1e-6) for now, first in zip(seen, self._first, strict=True)]
        progress = any(by > far + config.tolerance for by, far in zip(moved, self._furthest, strict=True))
        self._furthest = list(map(max, moved, self._furthest))
        self._still = 0 if progress else self._still + 1
        used = sum(length >= self._window for _, length, _ in rows) / len(rows)
        if self._still >= config.patience and used >= config.hit_ratio and self._window < config.max_len:
            self._window = self._inside(self._window + config.step)
            self._enter()

    def state_dict(self) -> dict[str, Any]:
        values = {"first": self._first, "furthest": self._furthest, "still": self._still}
        return {"strategy": "fastopd", "window": self._window, **values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _own_state(state, "fastopd", "window", "first", "furthest", "still")
        self._window = self._inside(int(state["window"]))
        self._first, self._furthest = list(state["first"]), list(state["furthest"])
        self._still = int(state["still"])


CONTROLLERS: dict[str, Callable[[HorizonConfig], HorizonController]] = {
    "full": FixedHorizon,
    "topd": FixedHorizon,
    "popd": ProgressiveHorizon,
    "prune": PruneHorizon,
    "marginal": MarginalHorizon,
    "adwin": AdwinHorizon,
    "fastopd": PlateauHorizon,
}


def make_controller(config: HorizonConfig) -> HorizonController:
    """The controller of `config.strategy`, at its first horizon."""
    return CONTROLLERS[config.strategy](config)


def _rows(
    reliable_length_B: Iterable[Any], length_B: Iterable[Any], finished_B: Iterable[Any]
) -> list[tuple[Any, Any, Any]]:
    """The three per-response columns as rows of plain numbers. A tensor is read in one copy, not element by element."""
    columns = [
        column.tolist() if hasattr(column, "tolist") else list(column)
        for column in (reliable_length_B, length_B, finished_B)
    ]
    if len({len(column) for column in columns}) != 1:
        sizes = ", ".join(
            f"{name} has {len(column)}"
            for name, column in zip(("reliable_length", "length", "finished"), columns, strict=True)
        )
        raise ValueError(f"one entry per response is needed in each, but {sizes}")
    return list(zip(*columns, strict=True))


def _own_state(state: dict[str, Any], strategy: str, *needed: str) -> None:
    wrote = state.get("strategy")
    if wrote != strategy:
        raise ConfigError(
            f"horizon.strategy = {strategy!r}, but the checkpoint's horizon state was written by {wrote!r}: "
            "resume with that strategy, or start a new run"
        )
    for name in needed:
        if name not in state:
            raise ConfigError(
                f"the checkpoint's horizon state has no {name!r}, which horizon.strategy = {strategy!r} needs"
            )
