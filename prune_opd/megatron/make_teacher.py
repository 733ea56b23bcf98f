"""The teacher of a run: in the job, with rows on disk or without, or in a server."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from prune_opd.config import TrainConfig
from prune_opd.elsewhere.row_store import RowStore
from prune_opd.elsewhere.teacher_digest import teacher_digest
from prune_opd.megatron.cached_teacher import CachedTeacher
from prune_opd.megatron.layout import Layout
from prune_opd.megatron.served_teacher import ServedTeacher
from prune_opd.megatron.teacher import Teacher


def make_teacher(
    config: TrainConfig, layout: Layout, dtype: torch.dtype, device: torch.device, run_dir: Path
) -> Teacher | ServedTeacher:
    """Collective over the job."""
    cache, fp8 = config.teacher_cache, config.precision.teacher_fp8
    if config.teacher_server.on:
        served = ServedTeacher(config, layout, device, run_dir)
        if cache.on:
            served.keep_in(_store(config, served.identity))
        return served
    directory = config.model_dirs["teacher"]
    kind, layers = CachedTeacher if cache.on else Teacher, cache.mode != "only"
    teacher = kind(directory, layout, dtype, device, config.parallel.microbatch_tokens, fp8, layers)
    if isinstance(teacher, CachedTeacher):
        teacher.keep_in(_store(config, teacher_digest(directory, f"{dtype} {dataclasses.asdict(fp8)}")))
    return teacher


def _store(config: TrainConfig, teacher: str) -> RowStore:
    cache = config.teacher_cache
    assert cache.dir is not None  # TeacherCacheConfig has seen to it
    return RowStore(Path(cache.dir).expanduser(), teacher, int(cache.max_gb * 1e9))
