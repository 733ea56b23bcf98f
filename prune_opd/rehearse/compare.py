"""What was counted in a rehearsal beside what the planner says of the same cut of the recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from prune_opd.config import memory_phases as phases
from prune_opd.plan.memory import loss_bytes, part_bytes, teacher_forward, working_bytes
from prune_opd.plan.setting import Setting
from prune_opd.rehearse.step import LOSS, Rehearsal

CLOSE = 0.05  # of the larger number
SMALL = 2**26  # bytes that no plan is changed by
COUNTED = (phases.STUDENT, phases.GRADIENTS, phases.OPTIMIZER, phases.TEACHER, phases.TEACHER_HEAD)


@dataclass(frozen=True)
class Line:
    """One number of both [bytes]. why: what is known of a difference; empty where there is none to speak of."""

    name: str
    counted: float
    planned: float
    why: str = ""

    @property
    def is_close(self) -> bool:
        return abs(self.counted - self.planned) <= max(CLOSE * max(self.counted, self.planned), SMALL)


def compare(rehearsal: Rehearsal) -> Iterator[Line]:
    """The parts, then the working memory of each phase that both know."""
    setting, ledger = rehearsal.setting, rehearsal.watch.ledger
    parts = part_bytes(setting)
    for part in COUNTED:
        counted = max((peak.by_part.get(part, 0) for peak in ledger.peaks.values()), default=0)
        why = "the planner takes the fullest stage" if rehearsal.run.layout.student.pp > 1 else ""
        yield Line(part, counted, parts[part], why)
    yield from _working(rehearsal)


def _working(rehearsal: Rehearsal) -> Iterator[Line]:
    """Of the micro-batch that there is. Train is outside the loss: they are never there together in full."""
    setting, peaks, tokens = rehearsal.setting, rehearsal.watch.ledger.peaks, rehearsal.tokens
    filled = filled_with(setting, tokens)
    planned = working_bytes(filled)
    buckets = [bucket.nbytes for bucket in rehearsal.run.sync.resharder.buckets]
    why = f"{len(buckets)} buckets of at most {gigabytes(max(buckets))}; the planner takes two full ones"
    yield Line("sync work", peaks["sync"].work - peaks["sync"].began, planned["sync"], why)
    why = "hidden states of other micro-batches lie beside it; what the student gathers grows during the first step"
    yield Line("teacher work", peaks["teacher"].work, teacher_forward(filled, tokens), why)
    if LOSS not in peaks:
        return
    loss = loss_bytes(filled, tokens)
    yield Line("train work", peaks["train"].work, planned["train"] - loss, "")
    yield Line("loss work", peaks[LOSS].work - peaks[LOSS].began, loss, "")


def filled_with(setting: Setting, tokens: int) -> Setting:
    """The setting as if a micro-batch could not have more than these tokens, nor a row."""
    config = setting.config
    longest = max(min(config.horizon.max_len, tokens - config.rollout.max_prompt_len), 1)
    horizon = replace(config.horizon, max_len=longest, min_len=min(config.horizon.min_len, longest), init_len=None)
    parallel = replace(config.parallel, microbatch_tokens=tokens)
    return replace(setting, config=replace(config, parallel=parallel, horizon=horizon))


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"
