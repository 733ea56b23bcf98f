"""What was counted in a rehearsal beside what the planner says of the same cut of the recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from prune_opd.config import memory_phases as phases
from prune_opd.plan.lengths import Lengths
from prune_opd.plan.memory import loss_bytes, parts_of_rank, teacher_bytes, teacher_forward, working_bytes
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
    parts = parts_of_rank(setting, rehearsal.rank)
    for part in (part for part in parts if part in COUNTED or part in map(phases.part_of, setting.teachers)):
        counted = max((peak.by_part.get(part, 0) for peak in ledger.peaks.values()), default=0)
        yield Line(part, counted, parts[part])
    if not setting.of:
        yield from _working(rehearsal)


def _working(rehearsal: Rehearsal) -> Iterator[Line]:
    """Of the micro-batch that there is. Train is outside the loss: they are never there together in full."""
    setting, peaks, stages = (
        rehearsal.setting,
        rehearsal.watch.ledger.peaks,
        rehearsal.setting.stages_of(rehearsal.rank),
    )
    filled = filled_with(setting, rehearsal)
    planned = working_bytes(filled, stages)
    buckets = [bucket.nbytes for bucket in rehearsal.run.sync.resharder.buckets]
    why = f"{len(buckets)} buckets of at most {gigabytes(max(buckets))}; the planner takes full ones"
    yield Line("sync work", peaks["sync"].work - peaks["sync"].began, planned["sync"], why)
    forward = teacher_forward(filled, rehearsal.teacher_tokens, stages.teacher)
    # Few rows are dealt unevenly: the hidden states are those that there are.
    teacher = teacher_bytes(filled, stages, forward, rehearsal.hidden_held, rehearsal.hidden_used)
    why = (
        "the last hidden states of the micro-batch before are there until the next is through; what the student "
        "gathers grows during the first step"
    )
    yield Line("teacher work", peaks["teacher"].work, teacher, why)
    loss = loss_bytes(filled, rehearsal.tokens) if LOSS in peaks else 0.0
    # Its graph ends in the input of a layer that is recomputed, whose gradient stays until the layer is called again.
    why = "megatron-core's dispatcher keeps each layer's routing" if setting.student.moe else ""
    yield Line("train work", peaks["train"].work, planned["train"] - loss, why)
    if LOSS in peaks:
        yield Line("loss work", peaks[LOSS].work - peaks[LOSS].began, loss)


def filled_with(setting: Setting, rehearsal: Rehearsal) -> Setting:
    """The setting as if a micro-batch could not have more tokens than the rehearsal's, nor a row or a loss's chunk."""
    config, tokens = setting.config, rehearsal.tokens
    longest = max(min(config.horizon.max_len, tokens * config.parallel.context - config.rollout.max_prompt_len), 2)
    horizon = replace(config.horizon, max_len=longest, min_len=min(config.horizon.min_len, longest), init_len=None)
    chunk = min(config.parallel.loss_chunk_tokens, max(rehearsal.predicting, 1))
    parallel = replace(config.parallel, microbatch_tokens=tokens, loss_chunk_tokens=chunk)
    lengths = Lengths.of(max(min(rehearsal.response_tokens / setting.responses, longest - 1), 1), longest)
    return replace(setting, config=replace(config, parallel=parallel, horizon=horizon), lengths=lengths)


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"
