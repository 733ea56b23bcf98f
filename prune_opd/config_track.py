"""Where a run's numbers go, and what is kept of its responses."""

from __future__ import annotations

from dataclasses import dataclass

from prune_opd.config_checks import between, one_of


@dataclass(frozen=True)
class TrackConfig:
    """metrics.jsonl is always there; this is what else a run leaves of its progress."""

    wandb: str = "offline"  # offline | online | disabled
    project: str = "prune-opd"  # wandb's
    tensorboard: bool = False  # event files in tensorboard/ of the run directory, too
    position_bins: int = 16  # resolution of the overlap-by-position curves
    samples: int = 4  # responses of a sampled step that are kept token by token in samples.jsonl; 0: none
    samples_every: int = 10  # steps from one sampled step to the next; the first and the last one always are
    report: bool = True  # write report.html at the end

    def __post_init__(self) -> None:
        one_of("track.wandb", self.wandb, ("offline", "online", "disabled"))
        between("track.position_bins", self.position_bins, 1)
        between("track.samples", self.samples, 0)
        between("track.samples_every", self.samples_every, 1)
