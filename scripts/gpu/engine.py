"""vLLM and the trainer on one GPU: short runs of the program itself, where vLLM is installed.

Each is three steps of the tiny pair on one rank. Before each step's rollouts the engine wakes, is loaded through the
resharding stream and, with `rollout.parity_every=1`, must give tokens the trainer's log-probabilities; after them it
sleeps, and its memory is the trainer's. A run ends with its engine asleep.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from prune_opd.platform import Platform
from scripts.gpu.rows import Row, Size

STEPS = 3
SECONDS = 400  # of a run: the first one compiles
COMMON = (
    f"steps={STEPS}",
    "evaluation.problems=0",
    "checkpoint.last=false",
    "rollout.prompts=16",
    "rollout.parity_every=1",
    "horizon.max_len=64",
)
ASLEEP = ("precision.params=bf16", "memory.sleep_level=2", "memory.offload_gradients=true", "parallel.nproc=1")
STOPPED = "stopped in flight"
GATE = ("rollout.inflight.mode=gate", "rollout.inflight.first_check=16", "rollout.inflight.stop_events=1")
RUNS = {
    "asleep between rollouts": ASLEEP,
    "student, teacher and optimizer away too": (
        *ASLEEP,
        "memory.offload_student=true",
        "memory.offload_teacher=true",
        "memory.offload_optimizer=true",
        "rollout.enforce_eager=true",  # the other runs have graphs, whose making takes half a minute
    ),
    STOPPED: (*ASLEEP, *GATE),
    "fp8, one scale a matrix": (*ASLEEP, "rollout.quantization=fp8_per_tensor", "rollout.enforce_eager=true"),
}
ON_A_CPU = {"never asleep": ("parallel.nproc=1",), STOPPED: ("parallel.nproc=1", *GATE)}


def engine_step(machine: Platform, size: Size) -> Iterator[Row]:
    """Whether each run comes to its end, and how far its engine was from the trainer."""
    if importlib.util.find_spec("vllm") is None:
        yield Row("engine", "runs with vLLM", "not here (no vllm)", "", None)
        return
    for name, settings in (ON_A_CPU if machine.is_cpu else RUNS).items():
        yield _run(name, settings)


def _run(name: str, settings: tuple[str, ...]) -> Row:
    stops = name == STOPPED
    expected = f"{STEPS} steps, every sync compared" + (", some responses stopped" if stops else "")
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        program = [sys.executable, "-m", "prune_opd.cli", "train", "tiny_compatible", *COMMON, *settings]
        try:
            done = subprocess.run(
                [*program, "--run-dir", str(run_dir)],
                env={"VLLM_LOGGING_LEVEL": "WARNING", **os.environ},
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return Row("engine", name, f"not done after {SECONDS} s", expected, False)
        lines = (run_dir / "metrics.jsonl").read_text().splitlines() if (run_dir / "metrics.jsonl").is_file() else []
        steps = [record for record in map(json.loads, lines) if "tokens_trained" in record]
        if done.returncode or len(steps) != STEPS:
            last = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()[-1]
            return Row(
                "engine", name, f"exit code {done.returncode} after {len(steps)} steps: {last}"[:300], expected, False
            )
        away = max(step["mismatch_mean"] or 0.0 for step in steps)
        stopped, seconds = sum(step["pruned_inflight"] for step in steps), steps[-1]["time_step"]
        figure = f"{len(steps)} steps, the last of {seconds:.1f} s, {stopped} responses stopped, |Δ| {away:.1e}"
        return Row("engine", name, figure, expected, not stops or stopped > 0)
