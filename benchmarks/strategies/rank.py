"""One run of the comparison: `prune-opd train` on one rank, with what no recipe needs.

Evaluations before the last one take fewer problems: they only draw the curves. A control replays the windows of another
run, whatever its own responses look like, or gives each response a random limit around them.

    python -m benchmarks.strategies.rank FOLDER        trains what `Wanted.write` left in FOLDER
"""

from __future__ import annotations

import json
import random
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_opd.cli.worker import protect_files, run_reported
from prune_opd.config import TrainConfig
from prune_opd.config.yaml import config_differences, load_config, save_config
from prune_opd.eval.evaluate import Evaluator, Scored
from prune_opd.process import end_with_parent
from prune_opd.ranks.signals import Interruption

if TYPE_CHECKING:
    from prune_opd.rollout.engine import RolloutEngine


@dataclass(frozen=True)
class Wanted:
    """Everything that decides a run. A finished run of the same is not repeated."""

    config: TrainConfig
    problems_between: int  # of the evaluations before the last one
    windows: tuple[int, ...] = ()  # a control's, step by step; none: the config's own strategy
    scatter: bool = False  # each response has a random limit around its window

    def write(self, folder: Path) -> None:
        save_config(self.config, folder / "wanted.yaml")
        (folder / "beside.json").write_text(json.dumps(self._beside()), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Wanted:
        """What `write` wrote. ConfigError, OSError, ValueError or TypeError where it is not that."""
        config = load_config(folder / "wanted.yaml")
        assert isinstance(config, TrainConfig)
        beside = json.loads((folder / "beside.json").read_text(encoding="utf-8"))
        return Wanted(config, **{**beside, "windows": tuple(beside["windows"])})

    def same(self, other: Wanted) -> bool:
        return not config_differences(self.config, other.config) and self._beside() == other._beside()

    def _beside(self) -> dict[str, Any]:
        return {"problems_between": self.problems_between, "windows": self.windows, "scatter": self.scatter}


class Replay:
    """A horizon controller: the given windows one after the other; the last one stays."""

    def __init__(self, windows: tuple[int, ...], max_len: int) -> None:
        self._windows, self._step = [min(window, max_len) for window in windows], 0

    @property
    def horizon(self) -> int:
        return self._windows[min(self._step, len(self._windows) - 1)]

    def update(self, reliable_length_B: Iterable[Any], length_B: Iterable[Any], finished_B: Iterable[Any]) -> None:
        self._step += 1

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = int(state["step"])


def scattered(max_len: int, seed: int) -> Callable[[int, int, int], list[int]]:
    """Random limits whose mean is the horizon: uniform on horizon ± d, d as large as 1..max_len allows.

    At `max_len` nothing is left to draw. The same draw for the same seed and step, on every rank.
    """

    def limits(horizon: int, responses: int, step: int) -> list[int]:
        reach = min(horizon - 1, max_len - horizon)
        draw = random.Random(f"{seed}/{step}")
        return [draw.randint(horizon - reach, horizon + reach) for _ in range(responses)]

    return limits


class FewerBetween(Evaluator):
    """An evaluator that takes its first `few` problems only, until `last` says that all are due."""

    def __init__(self, whole: Evaluator, few: int, last: Callable[[], bool]) -> None:
        super().__init__(whole.tokenizer, whole.task, whole.source, whole.problems[:few], whole.sampling)
        self.whole, self.last = whole, last

    def run(self, engine: RolloutEngine) -> Scored:
        return self.whole.run(engine) if self.last() else super().run(engine)


def train(folder: Path) -> int:
    """This process's run. Returns its exit code."""
    interruption = Interruption()  # before the heavy imports: a job may be stopped while it starts
    from prune_opd.loop import train_to_end
    from prune_opd.run import prepare

    wanted = Wanted.read(folder)
    config = wanted.config
    run = prepare(config, folder, "never")
    run.evaluators = [
        FewerBetween(whole, wanted.problems_between, lambda: run.finished_steps == config.steps)
        for whole in run.evaluators
    ]
    if wanted.windows:
        run.controller = Replay(wanted.windows, config.horizon.max_len)
    if wanted.scatter:
        run.limits = scattered(config.horizon.max_len, config.seed)
    return train_to_end(run, interruption)


if __name__ == "__main__":
    protect_files()
    end_with_parent(signal.SIGKILL)
    sys.exit(run_reported(lambda: train(Path(sys.argv[1]))))
