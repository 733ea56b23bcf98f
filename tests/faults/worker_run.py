"""Ranks of test_killed_runs.py: a training run like any other, in which one thing goes wrong.

    worker_run.py FAULT STEP RANK -- train CONFIG --run-dir DIR …

The fault happens for real, on one rank in one step; the product knows nothing of it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prune_opd.cli import worker

NOW: dict[str, Any] = {"step": None, "train": False}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    Path(os.environ["FAULT_REACHED"]).touch()
    time.sleep(600)


def engine_fails() -> None:
    raise RuntimeError("the engine's core has died")


def signals_itself() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def before(owner: Any, name: str, happens: Callable[[], None]) -> None:
    """Call `happens` before `owner.name`, when its step has come."""
    wrapped = getattr(owner, name)

    def with_fault(*args: Any, **kwargs: Any) -> Any:
        happens()
        return wrapped(*args, **kwargs)

    setattr(owner, name, with_fault)


def arm(fault: str, step: int) -> None:
    """Prepare the fault. Called before the run is built, on the rank where the fault shall happen."""
    from prune_opd import loop, platform

    def when_its_step_has_come(happens: Callable[[], None], after_calls: int = 0) -> Callable[[], None]:
        calls = 0

        def happen() -> None:
            nonlocal calls
            if NOW["step"] == step:
                calls += 1
                if calls > after_calls:
                    happens()

        return happen

    before_step = loop.step

    def note_step(run: Any) -> None:
        NOW["step"] = run.finished_steps + 1
        before_step(run)

    loop.step = note_step
    platform.prepare()
    if fault in ("kill in rollout", "engine fails"):
        from vllm.v1.engine.llm_engine import LLMEngine

        what = kill if fault == "kill in rollout" else engine_fails
        before(LLMEngine, "step", when_its_step_has_come(what, after_calls=3))  # in the middle of a generation
    elif fault == "kill in backward":
        loss_of = loop.gated_loss

        def with_hook(*args: Any, **kwargs: Any) -> Any:
            loss = loss_of(*args, **kwargs)

            def hooked(*inputs: Any) -> Any:
                loss_sum, tokens = loss(*inputs)
                if NOW["step"] == step:
                    inputs[2].register_hook(lambda gradient: kill())  # when the gradient reaches the hidden states
                return loss_sum, tokens

            return hooked

        loop.gated_loss = with_hook
    elif fault == "kill in save":
        from prune_opd.megatron import manifest

        before(manifest, "record_durably", when_its_step_has_come(kill, after_calls=1))  # shards, but no manifest
    elif fault != "none":
        from prune_opd.megatron.teacher import Teacher

        what = {"kill in teacher": kill, "hang": hang, "signal": signals_itself}[fault]
        before(Teacher, "hidden", when_its_step_has_come(what))


def main() -> int:
    fault, step, rank = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if os.environ["RANK"] == rank:
        arm(fault, step)
    return worker.main(sys.argv[5:])


if __name__ == "__main__":
    sys.exit(main())
