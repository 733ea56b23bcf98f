"""Where the CPU time of one step goes, by function: the tables of docs/pace.md.

    python scripts/profile_step.py RECIPE RUN_DIR [--step N] [key=value …]

One rank trains N steps, the last one under cProfile (which makes Python's part look larger than it is). Prints the
calls of each function in ROWS and its share of the step, callees included; RUN_DIR/profile has the rest (`pstats`).
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from pathlib import Path
from typing import Any, NamedTuple

from prune_opd import loop
from prune_opd.config import TrainConfig
from prune_opd.config.recipe import load_recipe
from prune_opd.run import prepare


class Function(NamedTuple):
    """label: dashes for each function above it that calls it. file: the end of its path."""

    label: str
    file: str
    name: str


# fmt: off
ROWS = (
    Function("vLLM: an engine step", "vllm/v1/engine/llm_engine.py", "step"),
    Function("– the model's forward", "vllm/v1/worker/gpu_model_runner.py", "_model_forward"),
    Function("– – RMSNorm", "vllm/model_executor/layers/layernorm.py", "forward_native"),
    Function("– – linear layers", "vllm/model_executor/layers/linear.py", "apply"),
    Function("– – attention", "vllm/model_executor/layers/attention/attention.py", "forward"),
    Function("– scheduler: `schedule`", "vllm/v1/core/sched/scheduler.py", "schedule"),
    Function("– – blocks for each row", "vllm/v1/core/kv_cache_manager.py", "allocate_slots"),
    Function("– scheduler: `update_from_output`", "vllm/v1/core/sched/scheduler.py", "update_from_output"),
    Function("– sampling", "vllm/v1/worker/gpu_model_runner.py", "sample_tokens"),
    Function("– outputs and log-probabilities", "vllm/v1/engine/output_processor.py", "process_outputs"),
    Function("– inputs of the step", "vllm/v1/worker/gpu_model_runner.py", "_prepare_inputs"),
    Function("our stand-in for `Tensor.to` and the factories", "prune_opd/platform.py", "call"),
    Function("training: forward, loss, backward, Adam", "prune_opd/megatron/trainer.py", "step_through"),
    Function("– backward", "torch/autograd/__init__.py", "backward"),
    Function("– the loss, both heads", "prune_opd/loss/distill.py", "distill_loss"),
    Function("teacher", "prune_opd/megatron/teacher.py", "hidden"),
    Function("sync", "prune_opd/megatron/sync.py", "__call__"),
    Function("packing", "prune_opd/megatron/train_batch.py", "make_batch"),
)
# fmt: on
STEP = Function("the step", "prune_opd/loop.py", "step")


def shares(stats: Any) -> list[tuple[str, int, float]]:
    """Label, calls and share of the step of each of ROWS that was called. stats: of `pstats.Stats`."""
    (whole,) = (seconds for _, seconds in _found(stats, STEP))
    rows = []
    for function in ROWS:
        if found := _found(stats, function):
            rows.append((function.label, sum(calls for calls, _ in found), sum(s for _, s in found) / whole))
    return rows


def _found(stats: Any, function: Function) -> list[tuple[int, float]]:
    """Calls and seconds, with callees, of each function of that name in that file."""
    return [
        (calls, seconds)
        for (file, _, name), (_, calls, _, seconds, _) in stats.items()
        if name == function.name and file.endswith(f"/{function.file}")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--step", type=int, default=3)
    given = parser.parse_intermixed_args()
    overrides = ["evaluation.problems=0", "checkpoint.last=false", "parallel.nproc=1", "parallel.tensor=1"]
    config = load_recipe(given.recipe, [*overrides, *given.overrides])
    assert isinstance(config, TrainConfig), f"{given.recipe} is no distillation"
    run = prepare(config, given.run_dir, "never")
    with run.tracker:
        for _ in range(given.step - 1):
            loop.step(run)
        horizon, profile = run.controller.horizon, cProfile.Profile(time.process_time)
        profile.enable()
        loop.step(run)
        profile.disable()
    profile.dump_stats(given.run_dir / "profile")
    stats: Any = pstats.Stats(profile)
    (whole,) = (seconds for _, seconds in _found(stats.stats, STEP))
    print(f"step {given.step}, window {horizon}: {whole:.2f} CPU s under the profile")
    for label, calls, share in shares(stats.stats):
        print(f"| {label} | {calls:,} | {share:.1%} |")
    run.close()


if __name__ == "__main__":
    main()
