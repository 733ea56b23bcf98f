"""One run of the comparison: `prune-opd train` on one rank, with what no recipe needs.

Evaluations before the last one take fewer problems: they only draw the curves; a run without problems is judged at its
end. A control replays the windows of another run, whatever its own responses look like, or gives each response a random
limit around them.

    python -m benchmarks.strategies.rank FOLDER        trains what `Wanted.write` left in FOLDER
"""

from __future__ import annotations

import json
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from benchmarks.strategies.judged import judge
from prune_opd.cli import ready
from prune_opd.cli.worker import protect_files, run_reported
from prune_opd.config import HorizonConfig, TrainConfig, to_dict
from prune_opd.config.yaml import from_dict
from prune_opd.eval.evaluate import Evaluator, Scored
from prune_opd.method.horizon import ProgressiveHorizon
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
        (folder / "wanted.json").write_text(json.dumps(to_dict(self)), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Wanted:
        """What `write` wrote. ConfigError, OSError or ValueError where it is not that."""
        return cast(Wanted, from_dict(Wanted, json.loads((folder / "wanted.json").read_text(encoding="utf-8"))))


class Replay(ProgressiveHorizon):
    """POPD with the given windows, one after the other; the last one stays."""

    def __init__(self, config: HorizonConfig, windows: tuple[int, ...]) -> None:
        super().__init__(config)
        self._windows = windows

    @property
    def horizon(self) -> int:
        return min(self._windows[min(self._step, len(self._windows) - 1)], self._config.max_len)


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
    ready.get_ready("train/compiled")
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
        run.controller = Replay(config.horizon, wanted.windows)
    if wanted.scatter:
        run.rollout.limits = scattered(config.horizon.max_len, config.seed)
    code = train_to_end(run, interruption)
    if code == 0 and not config.evaluation.problems:
        del run  # two models' memory
        judge(config, folder)
    return code


if __name__ == "__main__":
    protect_files()
    end_with_parent(signal.SIGKILL)
    sys.exit(run_reported(lambda: train(Path(sys.argv[1]))))
