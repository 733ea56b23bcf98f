"""Ranks of test_cached_teacher.py: training steps with a teacher in process, one that keeps its rows, and with none.

    torchrun … worker_cached_teacher.py MODELS OUT LAYOUT DTYPE

Rank r writes OUT/rank<r>.json: what each kind of run says of two steps, and what became of damaged and missing rows.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prune_opd import platform
from prune_opd.config import (
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    TeacherCacheConfig,
    TrainConfig,
)
from prune_opd.elsewhere.row_store import files
from prune_opd.errors import UserError
from tests.distributed.tiny_run import build_run, made_up_rollouts, train_config, train_step

BATCH = {"microbatch_tokens": 64, "loss_chunk_tokens": 16}
LAYOUTS = {
    "TP": ParallelConfig(tensor=None, **BATCH),  # student and teacher cut alike
    "DP": ParallelConfig(tensor=1, **BATCH),
    "DP, teacher TP 2": ParallelConfig(tensor=1, teacher_tensor=2, **BATCH),
    "TP, teacher PP 2": ParallelConfig(tensor=2, teacher_tensor=1, teacher_pipeline=2, **BATCH),
}
STEPS = 2


HINTS = (0, 40, 3, 0, 17, 5, 8)  # tokens of what the teacher reads before each row in place of the prompt


def steps(
    config: TrainConfig, layout: Any, out: Path, count: int = STEPS, hints: Sequence[int] = ()
) -> tuple[list[dict[str, Any]], Any]:
    """What metrics.jsonl would say of some steps, and the run."""
    run = build_run(config, layout, out)
    notes: list[str] = []
    run.teacher.note = notes.append
    found = []
    for number in range(count):
        began, hidden = time.process_time(), run.teacher.hidden

        def timed(*args: Any, hidden: Any = hidden) -> Any:
            nonlocal began
            began = time.process_time()
            result = hidden(*args)
            began = time.process_time() - began
            return result

        run.teacher.hidden = timed
        record = train_step(run, made_up_rollouts(number, hints))
        run.teacher.hidden = hidden
        found.append({"step": record, "cache": run.teacher.record, "notes": list(notes), "cpu": began})
        notes.clear()
    return found, run


def main(models: Path, out: Path, name: str, params: str) -> None:
    machine = platform.prepare()
    import torch.distributed as dist

    from prune_opd.megatron import layout as layouts

    parallel, folder = LAYOUTS[name], out / "rows"
    layout = layouts.initialize(parallel, machine, seed=0)
    plain = train_config(
        models,
        1,
        parallel=parallel,
        precision=PrecisionConfig(params=params),
        rollout=RolloutConfig(prompts=len(made_up_rollouts().prompts), responses=1, refresh_every=0),
        optimizer=OptimizerConfig(lr=1e-2, eps=1e-2, updates_per_batch=2),
        horizon=replace(train_config(models, 1).horizon, strategy="full", init_len=None),
    )
    cache = TeacherCacheConfig(mode="use", dir=str(folder), max_gb=1e-3)
    use, only = replace(plain, teacher_cache=cache), replace(plain, teacher_cache=replace(cache, mode="only"))
    results: dict[str, Any] = {}
    results["plain"], _ = steps(plain, layout, out)
    results["first"], _ = steps(use, layout, out)
    results["second"], _ = steps(use, layout, out)
    results["only"], run = steps(only, layout, out)
    results["layers"] = len(run.teacher.chunks)
    results["files"] = len(files(folder))
    dist.barrier()
    if layout.is_main:  # a row of the first step is gone, one of the second damaged
        first, second = (made_up_rollouts(number) for number in range(2))
        run.teacher.rows.store.path(run.teacher.rows._key(first, 3)).unlink()
        path = run.teacher.rows.store.path(run.teacher.rows._key(second, 5))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    dist.barrier()
    results["refused"] = []
    for number in range(2):
        try:
            run.teacher.hidden(made_up_rollouts(number), run.train_batch(made_up_rollouts(number)).deals)
        except UserError as error:
            results["refused"].append(str(error))
    results["repaired"], _ = steps(use, layout, out)
    results["after"], _ = steps(only, layout, out)
    # The same prompts and responses, before which the teacher reads something else.
    for kind, config in (("plain", plain), ("first", use), ("second", use)):
        results[f"hinted, {kind}"], _ = steps(config, layout, out, hints=HINTS)
    if params == "fp32":
        small = replace(cache, dir=str(out / "small"), max_gb=1e-6)
        # A folder without room for a step, and a disk that does not take any row.
        results["no room"], _ = steps(replace(use, teacher_cache=small), layout, out, 1)
        dist.barrier()
        if layout.is_main:
            shutil.rmtree(folder)
            folder.write_text("no folder")
        dist.barrier()
        results["no disk"], _ = steps(use, layout, out)
    (out / f"rank{layout.rank}.json").write_text(json.dumps(results))
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
