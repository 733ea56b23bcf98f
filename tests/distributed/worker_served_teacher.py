"""Ranks of test_served_teacher.py: training steps with a teacher in the job, and with the same one in a vLLM server.

    torchrun … worker_served_teacher.py MODELS OUT URL LAYOUT

Rank r writes OUT/rank<r>.json: what each kind of run says of two steps, and the errors where the server is another's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from prune_opd import platform
from prune_opd.config import (
    HorizonConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    SurvivalConfig,
    TeacherCacheConfig,
    TeacherServerConfig,
    TrainConfig,
)
from prune_opd.errors import UserError
from tests.distributed.tiny_run import build_run, made_up_rollouts, train_config, train_step

BATCH = {"microbatch_tokens": 64, "loss_chunk_tokens": 16}
LAYOUTS = {"TP": ParallelConfig(tensor=None, **BATCH), "DP": ParallelConfig(tensor=1, **BATCH)}
OBJECTIVES = {
    "reverse": ObjectiveConfig(k=8, support="teacher"),
    "bucket": ObjectiveConfig(k=8, support="teacher", tail="bucket"),
    "forward": ObjectiveConfig("topk_forward_kl", k=8),
    "sampled": ObjectiveConfig("sampled_token", k=8),
}
K = 16


def steps(config: TrainConfig, layout: Any, out: Path, count: int = 2) -> dict[str, Any]:
    run = build_run(config, layout, out)
    began, found = time.perf_counter(), [train_step(run, made_up_rollouts(number)) for number in range(count)]
    chunks = len(run.teacher.chunks)
    return {"steps": found, "record": run.teacher.record, "layers": chunks, "seconds": time.perf_counter() - began}


def refusal(act: Callable[[], Any]) -> str:
    try:
        act()
    except UserError as error:
        return str(error)
    return ""


def main(models: Path, out: Path, url: str, name: str) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts

    layout = layouts.initialize(LAYOUTS[name], machine, seed=0)
    base = train_config(
        models,
        1,
        parallel=LAYOUTS[name],
        optimizer=OptimizerConfig(lr=1e-2, eps=1e-2, updates_per_batch=2),
        rollout=RolloutConfig(prompts=7, responses=1, refresh_every=0, max_prompt_len=64),
        horizon=HorizonConfig(strategy="full", max_len=32, min_len=4),
    )
    server = TeacherServerConfig(url=url, top_k=K, timeout=60.0, retries=1)
    results: dict[str, Any] = {}
    for kind, objective in OBJECTIVES.items():
        plain = replace(base, objective=objective)
        served = replace(plain, teacher_server=server)
        results[kind] = {
            "in the job": steps(plain, layout, out / kind / "plain"),
            "served": steps(served, layout, out / kind / "served"),
        }
    cache = TeacherCacheConfig(mode="use", dir=str(out / "rows"), max_gb=0.01)
    results["kept"] = [
        steps(replace(served, teacher_cache=replace(cache, mode=mode)), layout, out / "kept" / str(turn))
        for turn, mode in enumerate(("use", "use", "only"))
    ]
    results["uncached"] = results["sampled"]["served"]["steps"]

    def built(**changes: Any) -> Callable[[], Any]:
        return lambda: build_run(replace(served, **changes), layout, out / "refused")

    other = replace(server, model="someone-elses")
    nobody = replace(server, url="http://127.0.0.1:9", retries=0, timeout=5.0)
    many, long = out / "many", HorizonConfig(strategy="full", max_len=480, min_len=4)
    results["refused"] = {
        "other weights": refusal(built(teacher=str(models / "student"))),
        "other name": refusal(built(teacher_server=other)),
        "nobody": refusal(built(teacher_server=nobody)),
        "too long": refusal(built(horizon=long, rollout=replace(base.rollout, max_prompt_len=64))),
        "too many ids": refusal(lambda: steps(replace(served, teacher_server=replace(server, top_k=40)), layout, many)),
    }
    # The same name, and another model behind it: what the run has begun with says otherwise.
    probe = out / "sampled" / "served" / "teacher_probe.json"
    if layout.is_main:
        said = json.loads(probe.read_text())
        said["logp"] = [value - 0.1 for value in said["logp"]]
        probe.write_text(json.dumps(said))
    results["refused"]["exchanged"] = refusal(lambda: build_run(served, layout, out / "sampled" / "served"))
    from prune_opd.data.prompts import make_sampler
    from prune_opd.megatron.self_test import check_teacher

    tested = replace(served, survival=SurvivalConfig(teacher_test=2))
    run = build_run(tested, layout, out / "tested")
    sampler = make_sampler(tested.data, tokenizer(tested), tested.seed)
    results["self-test"] = refusal(lambda: check_teacher(tested, run.teacher, sampler, run.vocab_size))
    (out / f"rank{layout.rank}.json").write_text(json.dumps(results))
    layouts.shutdown()


def tokenizer(config: TrainConfig) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(config.student)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
