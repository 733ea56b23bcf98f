"""Settings of the memory phases. `config.py` re-exports them; `memory.py` has the schedule."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from prune_opd.config_checks import between


@dataclass(frozen=True)
class MemoryConfig:
    """What leaves the device in the phases that do not need it (memory.py says which do). All off: nothing moves.

    What is offloaded goes to pinned host memory. On the CPU a schedule that moves something is a dry one: the
    transitions are logged and nothing moves.
    """

    sleep_level: int = 0  # vLLM outside its phases: 0 awake | 1 weights to the host, KV cache gone | 2 both gone
    staged_wake: bool = True  # wake the weights, load, and only then the KV cache; False: both before the load
    offload_student: bool = False  # weights, while they are neither trained nor sent
    offload_gradients: bool = False  # freed outside training: they start from zero there
    offload_optimizer: bool = False  # master weights and Adam's two moments, outside training
    offload_teacher: bool = False  # layers outside the teacher pass; its output weight outside that and training

    def __post_init__(self) -> None:
        between("memory.sleep_level", self.sleep_level, 0, 2)

    @property
    def on(self) -> bool:
        """Whether anything moves: how an engine wakes says nothing of whether it sleeps."""
        return dataclasses.replace(self, staged_wake=True) != MemoryConfig()
