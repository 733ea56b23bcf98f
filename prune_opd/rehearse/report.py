"""A rehearsal as its reader sees it: lines of text, one rank after the other."""

from __future__ import annotations

from collections.abc import Iterator

from prune_opd.config import TrainConfig
from prune_opd.rehearse.compare import compare, gigabytes
from prune_opd.rehearse.ledger import WORK
from prune_opd.rehearse.step import Cut, Rehearsal

BEFORE = "before "  # the moves between two phases
LEFT = 64 * 2**20  # bytes that may stay on the device after a step and belong to no part; more has been forgotten


def rank_lines(rehearsal: Rehearsal) -> Iterator[str]:
    """What one rank has shown."""
    watch = rehearsal.watch
    yield f"rank {rehearsal.rank} of {rehearsal.world}"
    yield "  fullest moment of each phase, counted from live tensors"
    for phase, peak in watch.ledger.peaks.items():
        if phase.startswith(BEFORE):
            continue
        parts = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in peak.by_part.items() if size > 5e6)
        yield f"    {phase:<11}{gigabytes(peak.total):>10}  {parts}"
    yield "  counted beside planned"
    for line in compare(rehearsal):
        verdict = "" if line.is_close else f"  differs: {line.why or 'unexplained'}"
        yield f"    {line.name:<13}{gigabytes(line.counted):>10} {gigabytes(line.planned):>10}{verdict}"
    yield "  collectives by phase and group"
    for (phase, group, operation), total in watch.traffic.by.items():
        yield f"    {phase:<11}{group:<22}{operation:<15}{total.count:>6} × {gigabytes(total.nbytes):>10}"
    yield f"  a checkpoint, of this rank; × {rehearsal.config.parallel.nproc} on a node"
    for kind, saving in rehearsal.saved.items():
        yield (
            f"    {kind:<15}{gigabytes(saving.device):>10} on the device, {gigabytes(saving.gathered)} gathered on the "
            f"host, {gigabytes(saving.written)} written, {gigabytes(saving.host)} of the host at the peak"
        )
    yield "  the host waits for the device"
    for (phase, how, place), count in watch.found.reads.items():
        if phase != "build" and not phase.startswith(BEFORE):
            yield f"    {phase:<11}{count:>5} × {how}, {place}"
    for problem in problems(rehearsal):
        yield f"  PROBLEM {problem}"


def problems(rehearsal: Rehearsal) -> Iterator[str]:
    """What would stop or spoil a run on a GPU."""
    watch = rehearsal.watch
    for (phase, what, place), count in watch.found.wrong_device.items():
        yield f"wrong device: {what} of a host tensor with one of the device, {count} ×, {phase}, {place}"
    for (phase, what, place), count in watch.found.missing.items():
        yield f"not gone through: {what} has no kernel without data, {count} ×, {phase}, {place}"
    for lost in rehearsal.lost:
        yield f"lost gradient: {lost}"
    if watch.ledger.by_part[WORK] > LEFT:
        sizes = ", ".join(gigabytes(size) for size in watch.ledger.largest())
        yield f"not freed: {gigabytes(watch.ledger.by_part[WORK])} belong to no part after the step (largest: {sizes})"


def not_rehearsed(config: TrainConfig, cut: Cut, rehearsals: list[Rehearsal]) -> Iterator[str]:
    """What a reader might think was gone through, and was not."""
    first = rehearsals[0]
    fp8 = "FP8 and " if config.precision.student_fp8.on or config.precision.teacher_fp8.on else ""
    yield f"{fp8}Transformer Engine's layers, because its kernels need a GPU: megatron-core's own, in {first.dtype}"
    if config.parallel.context > 1:
        yield "Transformer Engine's attention of ranks that share rows: what it allocates and sends, from its source"
    yield "what vLLM does, because it needs a GPU: its memory is the planner's, its responses fill micro-batches"
    if config.teachers:
        yield "working memory beside the plan, because teachers share it: their parts are compared, the peaks counted"
    if config.rollout.inflight.on:
        yield "the verdict of a look in flight, because rank 0 makes it of all ranks' evidence: nobody is stopped"
    yield "the disk: a checkpoint is planned and not written; evaluation and export, because they need responses"
    yield "numbers, because tensors have none: the host is told what a healthy step would say"
    if cut.layers is not None:
        yield f"layers beyond {cut.layers} of each model, because of --layers"
    full, rehearsed = config.rollout.prompts, first.config.rollout.prompts
    if rehearsed < full:
        yield f"{full - rehearsed} of {full} prompts, because --microbatches {cut.microbatches} is enough for the peaks"
