"""Small real runs of two ranks (megatron student and teacher, vLLM) in which something goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from prune_opd.config import CheckpointConfig, DataConfig, EvalConfig, RolloutConfig, TrackConfig, TrainConfig
from prune_opd.config.yaml import save_config
from prune_opd.data.ledger import Ledger
from prune_opd.process import rank_environment
from tests.distributed import tiny_run
from tests.forked import client

WORKER = Path(__file__).with_name("worker_run.py")
LAUNCH = """
import os, sys
from prune_opd.ranks.launcher import start_ranks
sys.exit(start_ranks(sys.argv[1:], 2, os.environ, ready=("prune_opd.cli.ready", "train/eager")))
"""
STEPS = 10


BAD_LINES = {3: b'{"prompt": "broken', 6: b'{"prompt": "  "}', 8: None, 11: '{"prompt": "caf\xe9"}'.encode("latin-1")}


def write_prompts(path: Path) -> Path:
    """Twelve good rows and four bad ones: broken JSON, an empty prompt, one that is too long, one that is not UTF-8."""
    task, good = Ledger(4, 8), iter(range(100))
    lines = []
    for number in range(1, 17):
        line = BAD_LINES.get(number, b"")
        if not line:
            text = task.problem(0, next(good), "train").prompt
            line = json.dumps({"prompt": " ".join([text] * 9) if number in BAD_LINES else text}).encode()
        lines.append(line)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def config_of(models: Path, bad_rows: str = "skip") -> TrainConfig:
    prompts = models / "prompts.jsonl"
    return tiny_run.train_config(
        models,
        tensor=2,
        steps=STEPS,
        rollout=RolloutConfig(prompts=4, responses=1, max_prompt_len=96, kv_cache_gb=0.1),
        data=DataConfig(source=str(prompts), bad_rows=bad_rows),
        checkpoint=CheckpointConfig(every=1, keep=3, export_hf=False),
        evaluation=EvalConfig(problems=0),
        track=TrackConfig(wandb="disabled", position_bins=4, report=False),
    )


@dataclass(frozen=True)
class Ended:
    code: int
    output: str  # stdout and stderr


def ended_run(
    config: TrainConfig,
    run_dir: Path,
    fault: str = "none",
    step: int = 0,
    rank: int = 0,
    options: Sequence[str] = (),
    **env: str,
) -> Ended:
    """A run with one fault, in forked ranks, to its end. options: more of `prune-opd train`."""
    arguments, more = [*_worker(config, run_dir, fault, step, rank), *options], _environment(run_dir, env)
    done = client.launch("eager", arguments, 2, rank_environment(client.environment(more)), timeout=120)
    assert done.code is not None, f"not done in time\n{done.stdout}"
    return Ended(done.code, done.stdout)


def _worker(config: TrainConfig, run_dir: Path, fault: str, step: int, rank: int) -> list[str]:
    resolved = run_dir.with_name(run_dir.name + ".yaml")
    save_config(config, resolved)
    return [str(WORKER), fault, str(step), str(rank), "--", "train", str(resolved), "--run-dir", str(run_dir)]


def _environment(run_dir: Path, env: dict[str, str]) -> dict[str, str]:
    return {"OMP_NUM_THREADS": "1", "FAULT_REACHED": str(run_dir.with_name("reached")), **env}


class Launch:
    """A run in the background, with one fault, as `prune-opd train` starts it. `ended` leaves nothing behind."""

    def __init__(
        self, config: TrainConfig, run_dir: Path, fault: str = "none", step: int = 0, rank: int = 0, **env: str
    ) -> None:
        self.reached = run_dir.with_name("reached")
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *_worker(config, run_dir, fault, step, rank)],
            env={**os.environ, **_environment(run_dir, env)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ended(self, timeout: float = 120.0) -> Ended:
        try:
            output, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for agent in psutil.Process(self.process.pid).children():
                agent.kill()  # and the kernel its ranks
            self.process.kill()
            output, _ = self.process.communicate()
            raise AssertionError(f"not done after {timeout:g} s\n{output}") from None
        return Ended(self.process.returncode, output)


def records(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {
            k: v
            for k, v in json.loads(line).items()
            if not k.startswith(("time_", "cpu_", "memory_", "flops_", "speed_", "mfu_"))
        }
        for line in lines
    ]


def latest(run_dir: Path) -> str:
    return (run_dir / "checkpoints" / "latest").read_text()


def quick_watchdog(config: TrainConfig, seconds: float) -> TrainConfig:
    return replace(config, survival=replace(config.survival, watchdog_minutes=seconds / 60))
