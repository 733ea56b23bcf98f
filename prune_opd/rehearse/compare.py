"""What was counted in a rehearsal beside what the planner says of the same cut of the recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from prune_opd.config import memory_phases as phases
from prune_opd.plan.memory import part_bytes, working_bytes
from prune_opd.plan.setting import Setting
from prune_opd.rehearse.step import Rehearsal

CLOSE = 0.05  # of the larger number
COUNTED = (phases.STUDENT, phases.GRADIENTS, phases.OPTIMIZER, phases.TEACHER, phases.TEACHER_HEAD)
WORKING = ("sync", "teacher", "train")


@dataclass(frozen=True)
class Line:
    """One number of both [bytes]. why: what is known of a difference; empty where there is none to speak of."""

    name: str
    counted: float
    planned: float
    why: str = ""

    @property
    def is_close(self) -> bool:
        return abs(self.counted - self.planned) <= CLOSE * max(self.counted, self.planned)


def compare(rehearsal: Rehearsal) -> Iterator[Line]:
    """The parts, then the working memory of each phase that both know."""
    setting, ledger = rehearsal.setting, rehearsal.watch.ledger
    parts = part_bytes(setting)
    for part in COUNTED:
        counted = max((peak.by_part.get(part, 0) for peak in ledger.peaks.values()), default=0)
        why = "the planner takes the fullest stage" if rehearsal.run.layout.student.pp > 1 else ""
        yield Line(part, counted, parts[part], why)
    planned = working_bytes(setting)
    for phase in WORKING:
        if phase not in ledger.peaks:
            continue
        line = Line(phase, ledger.peaks[phase].work, planned[phase])
        if not line.is_close and phase != "sync":
            filled = working_bytes(filled_with(setting, rehearsal.tokens))[phase]
            line = replace(
                line, why=f"{rehearsal.tokens} tokens in the largest micro-batch: {gigabytes(filled)} planned"
            )
        yield line


def filled_with(setting: Setting, tokens: int) -> Setting:
    """The setting as if a micro-batch could not have more than these tokens, nor a row."""
    config = setting.config
    longest = max(min(config.horizon.max_len, tokens - config.rollout.max_prompt_len), 1)
    horizon = replace(config.horizon, max_len=longest, min_len=min(config.horizon.min_len, longest), init_len=None)
    parallel = replace(config.parallel, microbatch_tokens=tokens)
    return replace(setting, config=replace(config, parallel=parallel, horizon=horizon))


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"
