"""`make soak`: a long run of the tiny pair that is killed at random from outside, beside one that is left alone.

It passes if both end with the same metrics, line by line but for the times; and if, in the run that was left alone, the
ranks' resident memory (growth ≤ 2 % over the last two thirds of the steps), open files and threads stay constant.

    python scripts/soak.py [--steps 300] [--kills 12] [--seed 0] [--out runs/soak]

Writes OUT/soak.json and exits with 1 if something did not hold.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median, mode
from typing import Any

import psutil
import typer

from prune_opd.errors import REQUEUE_EXIT_CODE
from prune_opd.track.metrics import CLOCKED, FILE_NAME, read_records

RSS_GROWTH = 0.02  # at most, between the medians of the first and the last stretch of steps
SETTINGS = (
    "rollout.prompts=8",
    "horizon.max_len=96",
    "evaluation.problems=16",
    "evaluation.every=50",
    "checkpoint.every=5",
    "checkpoint.export_hf=false",
    "track.wandb=disabled",
)
Sample = dict[str, float]


def start(steps: int, run_dir: Path) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).with_name("prune-opd")), "train", "tiny_compatible", f"steps={steps}"]
    output = (run_dir.parent / f"{run_dir.name}.log").open("ab")
    return subprocess.Popen([*command, *SETTINGS, "--run-dir", str(run_dir)], stdout=output, stderr=output)


def records(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    path = run_dir / FILE_NAME
    found = read_records(path) if path.exists() else []
    return [{key: value for key, value in record.items() if not key.startswith(CLOCKED)} for record in found]


def step_of(run_dir: Path) -> int:
    return max((record["step"] for record in records(run_dir)), default=0)


def agent_and_ranks(launcher: int) -> list[psutil.Process]:
    agent = psutil.Process(launcher).children()[:1]
    return agent + sorted((rank for one in agent for rank in one.children()), key=lambda process: process.pid)


# ---------------------------------------------------------------------------------------------------- left alone


def left_alone(steps: int, run_dir: Path) -> dict[int, dict[int, Sample]]:
    """Run to the end. Returns rank → step → resident memory [bytes], open files and threads just after the step."""
    process, samples, last = start(steps, run_dir), {}, 0
    while process.poll() is None:
        step = step_of(run_dir)
        if step > last:
            last = step
            for rank, of in enumerate(agent_and_ranks(process.pid)[1:]):
                try:
                    sample = {"rss": of.memory_info().rss, "files": of.num_fds(), "threads": of.num_threads()}
                except psutil.Error:
                    continue
                samples.setdefault(rank, {})[step] = sample
        time.sleep(0.05)
    if process.returncode != 0:
        sys.exit(f"error: the run that was left alone ended with {process.returncode}: see {run_dir}.log")
    return samples


def steadiness(samples: dict[int, Sample], steps: int) -> dict[str, Any]:
    """Median memory, and the most common numbers of files and threads, at the start and end of the last two thirds."""
    width = max(5, steps // 15)
    ends = (range(steps // 3, steps // 3 + width), range(steps - width, steps))  # the last step closes things
    first, last = ([samples[step] for step in end if step in samples] for end in ends)
    rss = [median(sample["rss"] for sample in end) for end in (first, last)]
    same = {key: [mode(sample[key] for sample in end) for end in (first, last)] for key in ("files", "threads")}
    return {"rss_mib": [value / 2**20 for value in rss], "rss_growth": rss[1] / rss[0] - 1, **same}


# ---------------------------------------------------------------------------------------------------- disturbed


def disturb(process: subprocess.Popen[bytes], draw: random.Random) -> str:
    """End the run from outside, in one of the ways in which clusters end runs. Returns which."""
    agent, *ranks = agent_and_ranks(process.pid) or [None]
    how = draw.choice(("rank 0 killed", "rank 1 killed", "agent killed", "all killed", "SIGTERM", "SIGUSR1"))
    if how.startswith("rank") and len(ranks) == 2:
        os.kill(ranks[int(how[5])].pid, signal.SIGKILL)
    elif how == "agent killed" and agent:
        os.kill(agent.pid, signal.SIGKILL)
    elif how.startswith("SIG"):
        process.send_signal(getattr(signal, how))
    else:
        process.kill()
    return how


def disturbed(steps: int, run_dir: Path, kills: int, draw: random.Random) -> list[dict[str, Any]]:
    """Run to the end, although it is ended from outside `kills` times, at random moments. Returns a log of them."""
    moments = sorted(draw.uniform(1, steps - 1) for _ in range(kills))
    log: list[dict[str, Any]] = []
    while True:
        process = start(steps, run_dir)
        moment = next((m for m in moments if m > step_of(run_dir)), None)
        while process.poll() is None and (moment is None or step_of(run_dir) < moment):
            time.sleep(0.05)
        if moment is None or process.poll() is not None:
            break
        time.sleep(draw.uniform(0, 0.5))  # anywhere in the step, saves and evaluations included
        log.append({"step": step_of(run_dir), "how": disturb(process, draw)})
        code = process.wait()
        if log[-1]["how"].startswith("SIG") and code not in (0, REQUEUE_EXIT_CODE):
            sys.exit(f"error: {log[-1]['how']} after step {log[-1]['step']} ended the run with {code}, not saved")
        log[-1]["code"] = code
    if process.wait() != 0:
        sys.exit(f"error: after {log[-1:]} the run did not go on: see {run_dir}.log")
    return log


def main(steps: int = 300, kills: int = 12, seed: int = 0, out: Path = Path("runs/soak")) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    began = time.monotonic()
    samples = left_alone(steps, out / "left_alone")
    log = disturbed(steps, out / "disturbed", kills, random.Random(seed))
    alone, hurt = (records(out / name) for name in ("left_alone", "disturbed"))
    steady = {rank: steadiness(of_rank, steps) for rank, of_rank in samples.items()}
    held = {
        "same metrics": alone == hurt,
        "memory flat": all(found["rss_growth"] <= RSS_GROWTH for found in steady.values()),
        "files constant": all(len(set(found["files"])) == 1 for found in steady.values()),
        "threads constant": all(len(set(found["threads"])) == 1 for found in steady.values()),
    }
    found = {"steps": steps, "seconds": time.monotonic() - began, "ends": log, "ranks": steady, "held": held}
    (out / "soak.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for line in log:
        print(f"after step {line['step']}: {line['how']}, exit code {line['code']}")
    for rank, of_rank in steady.items():
        first, last = of_rank["rss_mib"]
        growth, files, threads = of_rank["rss_growth"], of_rank["files"], of_rank["threads"]
        print(f"rank {rank}: {first:.0f} → {last:.0f} MiB ({growth:+.2%}), files {files}, threads {threads}")
    print(f"{steps} steps, {len(log)} ends, {found['seconds']:.0f} s: " + json.dumps(held))
    raise typer.Exit(0 if all(held.values()) else 1)


if __name__ == "__main__":
    typer.run(main)
