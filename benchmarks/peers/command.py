"""`prune-opd bench peers`: our training step against TRL's, on the same pair, prompts, lengths and number of updates.

The contenders start once and then take turns of a few steps, so that what else the machine does falls on all of them:

    ours_opd          the recipe with plain OPD at the full horizon: what TRL does, too
    ours_prune        the recipe's own strategy
    ours_eager        ours_opd with the recipe's own engine, which is not compiled, for a few steps
    trl               TRL's DistillationTrainer as two data-parallel ranks of one thread: its better layout here
    trl_one_process   the same as one process of two threads, for a few steps: what `python train.py` gives

Ours runs two data-parallel ranks of one thread as well, and vLLM compiles the model when it starts. TRL may, too: its
`torch_compile` makes no difference here. What a start costs is in no rate. Whatever a contender has trained is
evaluated by one process, on problems that no recipe was chosen on. No torch on this side.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.loss.command import BENCH_PACKAGES, Target, environment, has_trl
from benchmarks.peers.table import print_result
from benchmarks.peers.turns import POLL_SECONDS, Job, allow, read_steps
from prune_opd.check.run import check_train
from prune_opd.config import TrainConfig
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe
from prune_opd.config.yaml import save_config
from prune_opd.errors import UserError
from prune_opd.process import end_with_parent, rank_environment
from prune_opd.track.metrics import read_metrics

RECIPE = "tiny_compatible"
SAME_FOR_ALL = ("parallel.tensor=1", "evaluation.problems=0", "track.wandb=disabled", "checkpoint.every=0")
TARGET = 1.5  # our tokens per second over TRL's
OURS, TRL = "benchmarks.peers.ours", "benchmarks.peers.trl"
PHASES = ("time_sync", "time_rollout", "time_teacher", "time_train")


@dataclass(frozen=True)
class Contender:
    name: str
    module: str
    ranks: int = 2
    threads: int = 1
    overrides: tuple[str, ...] = ()
    steps: int | None = None  # None: all; fewer are timed only, not evaluated


FULL = ("horizon.strategy=full", "gate=null")
COMPILED = ("rollout.enforce_eager=false",)
CONTENDERS = (
    Contender("ours_opd", OURS, overrides=(*FULL, *COMPILED)),
    Contender("trl", TRL, overrides=FULL),
    Contender("ours_prune", OURS, overrides=COMPILED),
    Contender("ours_eager", OURS, overrides=FULL, steps=6),
    Contender("trl_one_process", TRL, ranks=1, threads=2, overrides=FULL, steps=6),
)


@dataclass(frozen=True)
class Settings:
    """What is measured. The defaults are the benchmark; QUICK only shows that it works."""

    steps: int = 20
    save_at: tuple[int, ...] = (10, 20)
    warmup: int = 2  # first steps of each contender: not in any rate
    turn: int = 6  # steps
    problems: int = 256
    overrides: tuple[str, ...] = ()


QUICK = Settings(
    steps=3, save_at=(3,), warmup=1, turn=1, problems=8, overrides=("rollout.prompts=4", "optimizer.warmup_steps=1")
)


def run(path: Path, quick: bool) -> int:
    """Measure, write the JSON file, print the tables. Returns 0 whether or not the target is reached.

    Raises `UserError` when TRL or the tiny models are missing, or a contender ends early.
    """
    if not has_trl():
        raise UserError(f"trl is not in {BENCH_PACKAGES} and cannot be imported: run `make setup-bench`")
    settings, console = QUICK if quick else Settings(), Console()
    configs = {contender.name: make_config(contender, settings) for contender in CONTENDERS}
    if problems := check_train(configs["ours_prune"], 2, None, "never"):
        raise UserError("\n".join(problems))
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {**environment(), "load_average_before": os.getloadavg()}
    with tempfile.TemporaryDirectory(prefix="prune-opd-") as name:
        folder = Path(name)
        jobs = {
            contender.name: _make_job(contender, configs[contender.name], settings, folder) for contender in CONTENDERS
        }
        _take_turns(jobs, settings, console)
        measured = {
            contender.name: summarise(read_ranks(jobs[contender.name], contender), settings.warmup)
            for contender in CONTENDERS
        }
        loads = {**machine, "load_average_after": os.getloadavg()}
        console.print("evaluating")
        accuracies = _evaluate(jobs, configs["ours_opd"], settings, folder)
    result = {
        "benchmark": "peers",
        "quick": quick,
        "recipe": RECIPE,
        "settings": asdict(settings),
        "environment": loads,
        "contenders": measured,
        **compare(measured, accuracies),
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print_result(result, console)
    console.print(f"[bold]{path}[/]", soft_wrap=True)
    return 0


def make_config(contender: Contender, settings: Settings) -> TrainConfig:
    """The recipe as this contender runs it."""
    overrides = [f"steps={settings.steps}", *SAME_FOR_ALL, *settings.overrides, *contender.overrides]
    config = apply_overrides(load_recipe(RECIPE), overrides)
    assert isinstance(config, TrainConfig)
    return config


# ---------------------------------------------------------------------------------------------------- running


def _make_job(contender: Contender, config: TrainConfig, settings: Settings, parent: Path) -> Job:
    folder = parent / contender.name
    folder.mkdir()
    save_config(config, folder / "config.yaml")
    steps = min(contender.steps or settings.steps, settings.steps)
    save_at = settings.save_at if contender.steps is None else ()
    job = Job(str(folder), str(folder / "config.yaml"), steps, save_at, contender.threads, microbatches=1)
    job.write()
    return job


def _take_turns(jobs: dict[str, Job], settings: Settings, console: Console) -> None:
    """Start every contender, wait until all are built, and let one at a time go on for a turn of steps."""
    with _started(CONTENDERS, jobs) as processes:
        for contender in CONTENDERS:
            folder = Path(jobs[contender.name].folder)
            _wait(processes, lambda: len(list(folder.glob("ready-*"))) == contender.ranks)  # noqa: B023
        for turn, end in enumerate(turn_ends(settings)):
            shift = turn % len(CONTENDERS)
            for contender in CONTENDERS[shift:] + CONTENDERS[:shift]:
                job = jobs[contender.name]
                last = min(end, job.steps)
                if len(read_steps(Path(job.folder), 0)) == last:
                    continue
                console.print(f"{contender.name}: to step {last} of {job.steps}")
                allow(Path(job.folder), last)
                _wait(processes, lambda: _finished(job, contender, last))  # noqa: B023
        for contender in CONTENDERS:
            processes[contender.name].wait(timeout=120)


def turn_ends(settings: Settings) -> list[int]:
    """The last step of each turn: first the warm-up, then `turn` steps at a time."""
    return [*range(settings.warmup, settings.steps, settings.turn), settings.steps]


def _finished(job: Job, contender: Contender, step: int) -> bool:
    """Whether every rank has done its step, and all of its work if that was the last one."""
    folder = Path(job.folder)
    stepped = all(len(read_steps(folder, rank)) >= step for rank in range(contender.ranks))
    saved = all((job.hf_dir(at) / "saved").exists() for at in job.save_at if at <= step)
    return stepped and saved and (step < job.steps or len(list(folder.glob("done-*.json"))) == contender.ranks)


@contextmanager
def _started(contenders: Sequence[Contender], jobs: dict[str, Job]) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Their processes; none is left at the end."""
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for contender in contenders:
            folder = Path(jobs[contender.name].folder)
            arguments = ["-m", contender.module, str(folder / "job.json")]
            processes[contender.name] = start(arguments, contender.ranks, contender.threads, folder / "log")
        yield processes
    finally:
        for process in processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in processes.values():
            try:
                process.wait(timeout=40)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def start(arguments: list[str], ranks: int, threads: int, log: Path) -> subprocess.Popen[bytes]:
    """A Python program, alone or once per rank under torchrun, with TRL's packages in sight; output goes to `log`."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    if TRL not in arguments:
        env = rank_environment(env)
    else:
        env["TORCH_CPP_LOG_LEVEL"] = "ERROR"
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(BENCH_PACKAGES)]))
    launcher = [
        "-m",
        "prune_opd.ranks.launcher",
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        str(ranks),
    ]
    command = [sys.executable, *(launcher if ranks > 1 or TRL not in arguments else []), *arguments]
    with log.open("wb") as out:
        return subprocess.Popen(
            command, env=env, stdout=out, stderr=out, start_new_session=True, preexec_fn=_ends_with_this_process
        )


def _ends_with_this_process() -> None:
    end_with_parent(signal.SIGTERM)


def _wait(processes: dict[str, subprocess.Popen[bytes]], done: Callable[[], bool]) -> None:
    """Sleep until `done`. Raises `UserError` with the last words of a contender that failed."""
    while not done():
        for name, process in processes.items():
            if process.poll():
                raise UserError(f"the contender {name} ended with exit code {process.returncode}")
        time.sleep(POLL_SECONDS)


def _evaluate(jobs: dict[str, Job], config: TrainConfig, settings: Settings, folder: Path) -> dict[str, Any]:
    """Accuracy of the student and of everything saved: {"student": …, "trl/15": …}."""
    models = {"student": config.student}
    models |= {f"{name}/{step}": str(job.hf_dir(step)) for name, job in jobs.items() for step in job.save_at}
    request, answer = folder / "evaluate.json", folder / "accuracies.json"
    request.write_text(
        json.dumps({"models": models, "config": jobs["ours_opd"].config, "problems": settings.problems}),
        encoding="utf-8",
    )
    log = folder / "evaluate.log"
    process = start(["-m", "benchmarks.peers.accuracy", str(request), str(answer)], 2, 1, log)
    if process.wait() != 0:
        raise UserError(f"the evaluation failed: {last_words(log)}")
    return json.loads(answer.read_text(encoding="utf-8"))


def last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "it said nothing"


# ---------------------------------------------------------------------------------------------------- comparing


def read_ranks(job: Job, contender: Contender) -> list[dict[str, Any]]:
    """The contender's steps: slowest rank's seconds, all ranks' CPU seconds, peaks and tokens, our phases."""
    ranks = [read_steps(Path(job.folder), rank) for rank in range(contender.ranks)]
    metrics = Path(job.folder) / "run" / "metrics.jsonl"
    ours = read_metrics(metrics)[0] if contender.module == OURS else [{}] * job.steps
    steps = []
    for parts, record in zip(zip(*ranks, strict=True), ours, strict=True):
        steps.append(
            {
                "step": parts[0]["step"],
                "wall_s": max(part["wall_s"] for part in parts),
                "cpu_s": sum(part["cpu_s"] for part in parts),
                "peak_bytes": sum(part["peak_bytes"] for part in parts),
                "tokens": record.get("tokens_generated") or sum(part["tokens"] for part in parts),
                **{phase: record[phase] for phase in PHASES if phase in record},
            }
        )
    return steps


def summarise(steps: list[dict[str, Any]], warmup: int) -> dict[str, Any]:
    """Rates over the steps after the warm-up; the peak, and the tokens so far, are of all of them."""
    timed = steps[warmup:]
    wall, tokens = sum(step["wall_s"] for step in timed), sum(step["tokens"] for step in timed)
    so_far, total = {}, 0
    for step in steps:
        total += step["tokens"]
        so_far[str(int(step["step"]))] = total
    return {
        "tokens_per_s": tokens / wall,
        "cpu_s_per_1000_tokens": 1000 * sum(step["cpu_s"] for step in timed) / tokens,
        "step_s": median(step["wall_s"] for step in timed),
        "timed_steps": len(timed),
        "peak_bytes": max(step["peak_bytes"] for step in steps),
        "phases_s": {phase: median(step[phase] for step in timed) for phase in PHASES if phase in timed[0]},
        "tokens_so_far": so_far,
        "steps": steps,
    }


def compare(measured: dict[str, Any], accuracies: dict[str, Any]) -> dict[str, Any]:
    """Each contender's curve of accuracy against tokens, accuracies at equal tokens, the ratio and the verdict."""
    trl = max((name for name in measured if name.startswith("trl")), key=lambda name: measured[name]["tokens_per_s"])
    rate = measured[trl]["tokens_per_s"]
    start = {"step": 0, "tokens": 0, **accuracies["student"]}
    curves: dict[str, list[dict[str, Any]]] = {}
    for key, accuracy in accuracies.items():
        name, _, step = key.partition("/")
        if step:
            tokens = measured[name]["tokens_so_far"][step]
            curves.setdefault(name, [start]).append({"step": int(step), "tokens": tokens, **accuracy})
    common = min(curve[-1]["tokens"] for curve in curves.values())
    last = curves["trl"][-1]
    noise = (last["stderr"] ** 2 + start["stderr"] ** 2) ** 0.5
    target = Target(
        f"tokens per second, ours_opd / {trl}", measured["ours_opd"]["tokens_per_s"] / rate, TARGET, at_least=True
    )
    return {
        "best_trl": trl,
        "ratios": {name: row["tokens_per_s"] / rate for name, row in measured.items()},
        "curves": curves,
        "equal_tokens": common,
        "accuracy_at_equal_tokens": {name: accuracy_at(curve, common) for name, curve in curves.items()},
        "trl_learned": last["accuracy"] - start["accuracy"] > 3 * noise,
        "targets": [{**asdict(target), "reached": target.reached, "text": str(target)}],
    }


def accuracy_at(curve: Sequence[dict[str, Any]], tokens: float) -> float:
    """A curve's accuracy after `tokens` generated tokens, on the straight line between the evaluations around it."""
    for before, after in itertools.pairwise(curve):
        if tokens <= after["tokens"]:
            share = (tokens - before["tokens"]) / (after["tokens"] - before["tokens"])
            return float(before["accuracy"] + share * (after["accuracy"] - before["accuracy"]))
    return float(curve[-1]["accuracy"])
