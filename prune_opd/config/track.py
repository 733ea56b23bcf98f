"""What a run records, and what a plan of it assumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prune_opd.config.checks import Checked, Count, CountOrZero, Positive


@dataclass(frozen=True)
class TrackConfig(Checked, name="track"):
    """What a run records beside metrics.jsonl, which is always written."""

    wandb: Literal["offline", "online", "disabled"] = "offline"  # offline: in wandb/ of the run directory, to be synced
    project: str = "prune-opd"  # wandb's
    entity: str | None = None  # wandb's: whose project; null: the key's own
    group: str | None = None  # wandb's: runs of a group are folded into one; a launched sweep is one
    tags: tuple[str, ...] = ()  # wandb's
    tensorboard: bool = False  # event files in tensorboard/ of the run directory, too
    position_bins: Count = 16  # resolution of the overlap-by-position curves
    samples: CountOrZero = 4  # responses of a sampled step that are kept token by token in samples.jsonl; 0: none
    samples_every: Count = 10  # steps between sampled steps; the first and the last step are always sampled
    report: bool = True  # write report.html at the end


@dataclass(frozen=True)
class PlanningConfig(Checked, name="planning"):
    """What a plan assumes. It changes nothing in a run."""

    gpu: Literal["cpu", "a100", "h100", "h200"] = "cpu"  # what the recipe is made for
    nodes: Count = 1  # of parallel.nproc ranks each
    response_length: Count | None = None  # mean tokens at the full horizon (`response_length` of a run's metrics)
    # FLOP/s of a rank's device at its best, for the MFU in the metrics; null: bf16's of `gpu`, on a CPU no MFU
    peak_flops: Positive | None = None
    mean_horizon: Count | None = None  # prune: mean of the window over the run (`horizon` in a run's metrics)
