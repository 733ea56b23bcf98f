"""Settings of what a run leaves on disk and of how it takes trouble. `config.py` re-exports them."""

from __future__ import annotations

from dataclasses import dataclass

from prune_opd.config_checks import between


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which of them stay (megatron/checkpoint.py has the format)."""

    every: int = 50  # steps; 0: only at the end
    keep: int = 2  # newest checkpoints that stay on disk
    keep_every: int = 0  # checkpoints of these steps stay for good: 100, 200 …; 0: none does
    asynchronous: bool = True  # a child process writes while the next steps run; False: the run waits for the disk
    last: bool = True  # save after the last step; without it the run cannot be resumed or exported later
    export_hf: bool = True  # write hf/ at the end of the run

    def __post_init__(self) -> None:
        between("checkpoint.every", self.every, 0)
        between("checkpoint.keep", self.keep, 1)
        between("checkpoint.keep_every", self.keep_every, 0)


@dataclass(frozen=True)
class SurvivalConfig:
    """What a run puts up with (survival.py)."""

    max_skipped: int = 3  # updates in a row whose loss or gradient is not finite: so many end the run
    watchdog_minutes: float = 30.0  # of one phase: a longer one ends the run with the stacks of all ranks; 0: never

    def __post_init__(self) -> None:
        between("survival.max_skipped", self.max_skipped, 1)
        between("survival.watchdog_minutes", self.watchdog_minutes, 0)
