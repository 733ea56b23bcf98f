"""The process of test_sleep.py: an engine whose memory is filled with NaN while it sleeps: on a GPU nothing keeps it.

    python worker_sleep.py MODELS OUT

vLLM's CPU build cannot sleep. Here its worker does what level 2 does (gpu_worker.py): buffers are kept aside and come
back with the weights' tag; everything else that was freed holds NaN from then on, until somebody writes it.
Writes OUT/sleep.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_opd import platform
from prune_opd.config import ParallelConfig, RolloutConfig
from prune_opd.rollout.request import TokenSampling, new_rows
from tests.rollout.worker_engine import make_prompts

ROUNDS, MAX_TOKENS = 3, 24
AWAKE: list[list[str]] = []  # tags of every waking


def spoil(tensors: Any) -> None:
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            tensor.data.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


def sleep(worker: Any, level: int = 1) -> None:
    assert level == 2
    model = worker.model_runner.model
    worker.kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    spoil(model.buffers())
    spoil(model.parameters())
    spoil(worker.model_runner.kv_caches)


def wake_up(worker: Any, tags: list[str] | None = None) -> None:
    AWAKE.append(sorted(tags or ()))
    if "weights" in (tags or ()):
        for name, buffer in worker.model_runner.model.named_buffers():
            buffer.data.copy_(worker.kept[name])


def main(models: Path, out: Path) -> None:
    machine = platform.prepare()
    from vllm.v1.worker.cpu_worker import CPUWorker

    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.model import build
    from prune_opd.rollout.engine import RolloutEngine
    from prune_opd.weights.stream import Resharder

    CPUWorker.sleep, CPUWorker.wake_up = sleep, wake_up  # type: ignore[method-assign]
    layout = layouts.initialize(ParallelConfig(), machine, seed=0)
    engine = RolloutEngine(
        str(models / "student"), RolloutConfig(max_prompt_len=256, max_num_seqs=8, kv_cache_gb=0.01), 64, torch.float32,
        machine,
    )  # fmt: skip
    engine.sleep_level = 2
    resharder = Resharder(build(models / "teacher", layout.student, torch.float32, trainable=False))

    def generated() -> list[Any]:
        rows = new_rows(make_prompts(), 2, MAX_TOKENS)
        found = engine.generate(rows, TokenSampling(seed=3, step=1, logprobs=True)).responses
        return [[list(response.ids), list(response.logprobs or ())] for response in found]

    engine.load(resharder.stream())
    results: dict[str, Any] = {"before": generated(), "rounds": []}
    for _ in range(ROUNDS):
        engine.sleep()
        holds = engine.holds_weights
        engine.wake_up(["weights"])
        engine.load(resharder.stream())
        engine.wake_up(["kv_cache"])
        results["rounds"].append({"holds while asleep": holds, "after": generated()})
    engine.sleep()
    engine.wake_up(["weights"])
    engine.wake_up(["kv_cache"])
    try:
        results["without a load"] = generated()
    except Exception as error:
        results["without a load"] = f"{type(error).__name__}: {error}"
    engine.load(resharder.stream())
    engine.sleep()
    AWAKE.clear()
    engine.close()
    results["woken by the close"] = AWAKE
    (out / "sleep.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
