"""The ranks of `prune-opd bench scaling`: steps of the training loop on one model, at several lengths and batches.

`loop.step` runs as it does in training, on a run that `run.prepare` built; between the points only the batch size and
the horizon change. Student and teacher have random weights: they take one of the vocabulary's tokens about as likely as
another, so that a response seldom ends by itself. CPU seconds are this process's, all threads, by phase; memory is the
kernel's peak of resident memory (VmHWM) in a step, over what was resident before it and over that of the imports alone.
"""

from __future__ import annotations

import ctypes
import gc
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch.distributed as dist

from benchmarks.common import answer, model_shape, peak_memory, reset_peak, write_model
from benchmarks.studies.scaling.work import PHASES, work
from prune_opd import loop, platform
from prune_opd.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    HorizonConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    SurvivalConfig,
    TrackConfig,
    TrainConfig,
)
from prune_opd.method.horizon import make_controller
from prune_opd.plan.counts import parameters
from prune_opd.rollout.engine import ENVIRONMENT
from prune_opd.rollout.phase import RolloutPhase
from prune_opd.run import Run, prepare
from prune_opd.track.tracker import NullTracker

PROMPT = 32  # tokens at most: short ones, so that the responses are what grows
DATA = DataConfig(source="ledger", min_steps=5, max_steps=5)


class LastRecord(NullTracker):
    """Keeps the record of the last step, on every rank."""

    record: dict[str, Any]

    def step(self, record: dict[str, Any]) -> None:
        self.record = record


def config_of(folder: Path, points: Sequence[tuple[int, int]], steps: int) -> TrainConfig:
    """Data parallel over all ranks, an engine each, full horizon: every response may have the whole length."""
    batch, length = (max(point[i] for point in points) for i in (0, 1))
    return TrainConfig(
        name="scaling",
        student=str(folder / "student"),
        teacher=str(folder / "teacher"),
        steps=steps,
        horizon=HorizonConfig(strategy="full", max_len=length, min_len=1),
        rollout=RolloutConfig(prompts=batch, responses=1, max_prompt_len=PROMPT, max_num_seqs=batch, kv_cache_gb=0.75),
        data=DATA,
        parallel=ParallelConfig(tensor=1),
        precision=PrecisionConfig(params="fp32"),
        evaluation=EvalConfig(problems=0),
        checkpoint=CheckpointConfig(export_hf=False),
        survival=SurvivalConfig(teacher_test=0),  # of random weights nothing is likely
        track=TrackConfig(wandb="disabled"),
    )


def one_step(run: Run, records: LastRecord, imported: int) -> dict[str, Any]:
    """What a step took, and the work that it was, of all ranks together."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the step before freed would hide what this one takes
    dist.barrier()
    before = reset_peak()
    loop.step(run)
    highest = peak_memory()
    prompt = mean(len(run.rollout.sampler.source.get(index).ids) for index in range(16))
    return {
        "wall_s": {phase: records.record[f"time_{phase}"] for phase in (*PHASES, "step")},
        "cpu_s": {phase: records.record[f"cpu_{phase}"] for phase in (*PHASES, "step")},
        "step_bytes": highest - before,
        "held_bytes": highest - imported,
        "tokens": records.record["tokens_generated"],
        "response_length": (response := records.record["response_length"]),
        "work": work(run.trainer.spec, run.config.rollout.prompts, prompt, response, run.layout.world),
    }


def take_turns(run: Run, points: Sequence[tuple[int, int]], rounds: int, imported: int) -> dict[str, Any]:
    """The points take turns, round after round, after one small step that pays for the parity check and cold caches."""
    config = run.config
    run.tracker = records = LastRecord()

    def go(batch: int, length: int) -> dict[str, Any]:
        run.config = replace(
            config, rollout=replace(config.rollout, prompts=batch), horizon=replace(config.horizon, max_len=length)
        )
        run.controller = make_controller(run.config.horizon)
        run.rollout = RolloutPhase(run.config, run.rollout.engine, run.rollout.sampler)
        return one_step(run, records, imported)

    go(*min(points))
    steps: list[list[dict[str, Any]]] = [[] for _ in points]
    for _ in range(rounds):
        for at, (batch, length) in enumerate(points):
            steps[at].append(go(batch, length))
    return {
        "parameters": parameters(run.trainer.spec),
        "points": [
            {"batch": batch, "length": length, "steps": taken}
            for (batch, length), taken in zip(points, steps, strict=True)
        ],
    }


def measure(shape: Sequence[int], points: Sequence[tuple[int, int]], rounds: int) -> dict[str, Any]:
    """This rank's steps of one model. shape: layers, hidden size, vocabulary; points: batch and length each."""
    platform.prepare()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import vllm  # noqa: F401  (its memory is not the run's)

    imported = reset_peak()
    layers, hidden, vocab = shape
    model = replace(model_shape(layers, hidden), max_positions=2048)
    with tempfile.TemporaryDirectory(prefix="prune-opd-") as name:
        folder = Path(name)  # each rank writes the same models for itself
        for seed, role in enumerate(("student", "teacher")):
            write_model(folder / role, model, vocab, seed)
        config = config_of(folder, points, steps=1 + rounds * len(points))
        run = prepare(config, folder / "run", "never")
        measured = take_turns(run, points, rounds, imported)
        run.close()
    return measured


if __name__ == "__main__":
    answer(measure)
