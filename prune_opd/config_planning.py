"""What a recipe assumes of its hardware and its responses, for `prune-opd plan`. `config.py` re-exports it.

Nothing here changes a run: it is what no file says before the run has been made.
"""

from __future__ import annotations

from dataclasses import dataclass

from prune_opd.config_checks import between, one_of

GPUS = ("cpu", "a100", "h100", "h200")


@dataclass(frozen=True)
class PlanningConfig:
    """What a plan assumes; it changes nothing in a run."""

    gpu: str = "cpu"  # what the recipe is made for: cpu | a100 | h100 | h200
    nodes: int = 1  # of parallel.nproc ranks each
    response_length: int | None = None  # mean tokens at the full horizon (`response_length` of a run's metrics)
    mean_horizon: int | None = None  # prune: the window's mean over the run (`horizon` of a run's metrics)

    def __post_init__(self) -> None:
        one_of("planning.gpu", self.gpu, GPUS)
        between("planning.nodes", self.nodes, 1)
        for name in ("response_length", "mean_horizon"):
            if getattr(self, name) is not None:
                between(f"planning.{name}", getattr(self, name), 1)
