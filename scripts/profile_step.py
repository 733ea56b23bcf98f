"""Where the CPU time of a step goes, by function: the tables of docs/pace.md.

    python scripts/profile_step.py RECIPE RUN_DIR [--step N] [--steps COUNT] [key=value …]

One rank trains N - 1 steps, then COUNT under a sampler, which looks at the stack every two milliseconds of CPU time.
Prints each function of ROWS that was seen, with its share of the steps, callees included; RUN_DIR/profile.txt
has every function. A profiler that notes each call (cProfile) will not do: it made vLLM's scheduler, many short calls,
look six times as large as it is.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

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
SECONDS = 0.002  # between two looks, of CPU time


class Samples:
    """How long each function was on the stack. `seconds`: (file, name) → CPU seconds of the `whole`.

    A look comes when Python's next instruction begins, so a long call into C has one, at its end. Each look has the CPU
    time since the one before.
    """

    def __init__(self) -> None:
        self.whole, self.seconds = 0.0, Counter[tuple[str, str]]()
        self._last = 0.0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Look while the block runs."""
        before = signal.signal(signal.SIGPROF, lambda _, frame: self.look(frame, time.process_time()))
        self._last = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS, SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)

    def look(self, frame: FrameType | None, now: float) -> None:
        stack = set()  # a function that calls itself counts once
        while frame is not None:
            stack.add((frame.f_code.co_filename, frame.f_code.co_name))
            frame = frame.f_back
        passed, self._last = now - self._last, now
        self.whole += passed
        for function in stack:
            self.seconds[function] += passed

    def share(self, function: Function) -> float | None:
        """Of the steps; None if it was never seen."""
        return self._of(function) / self._of(STEP) if self._of(function) else None

    def _of(self, function: Function) -> float:
        return sum(
            seconds
            for (file, name), seconds in self.seconds.items()
            if name == function.name and file.endswith(f"/{function.file}")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--step", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    given = parser.parse_intermixed_args()
    overrides = ["evaluation.problems=0", "checkpoint.last=false", "parallel.nproc=1", "parallel.tensor=1"]
    config = load_recipe(given.recipe, [*overrides, *given.overrides])
    assert isinstance(config, TrainConfig), f"{given.recipe} is no distillation"
    run, samples, windows = prepare(config, given.run_dir, "never"), Samples(), []
    with run.tracker:
        for _ in range(given.step - 1):
            loop.step(run)
        with samples.taken():
            for _ in range(given.steps):
                windows.append(run.controller.horizon)
                loop.step(run)
    print(f"steps {given.step} to {given.step + given.steps - 1}, windows {windows}: {samples.whole:.2f} CPU s")
    for function in ROWS:
        if (share := samples.share(function)) is not None:
            print(f"| {function.label} | {share:.1%} |")
    lines = [f"{seconds / samples.whole:.2%} {file} {name}" for (file, name), seconds in samples.seconds.most_common()]
    (given.run_dir / "profile.txt").write_text("\n".join(lines), encoding="utf-8")
    run.close()


if __name__ == "__main__":
    main()
