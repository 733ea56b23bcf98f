"""A run directory with believable numbers, for tests of the report and for looking at it by eye.

`python -m tests.track.synthetic DIR` writes three runs and their reports under DIR.
"""

from __future__ import annotations

import math
import random
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

from prune_opd.config import GateConfig, HorizonConfig, TrackConfig, TrainConfig, to_dict
from prune_opd.track import samples
from prune_opd.track.metrics import FILE_NAME, MetricsLog

MAX_LEN, BINS, RESPONSES = 512, 16, 64

# What a hostile model, or a careless user, may put into a run.
SCRIPT = "<script>window.planted = 1; alert(1)</script>"
TEXT = f"</pre></script><!--<script>{SCRIPT}<img src=x onerror=alert(2)>"
KEY = "hf_" + 3 * "PlantedKey"  # of a shape that is known
VALUE = "planted_value_of_a_variable"  # of a variable that is named like a secret
PASSWORD = "planted-password"


def write_run(
    run_dir: Path,
    *,
    name: str = "ledger-prune",
    strategy: str = "prune",
    steps: int = 40,
    evaluate_every: int = 10,
    seed: int = 0,
    student: str = "models/student",
    planted: str = "",
) -> Path:
    """Writes config.yaml, metrics.jsonl and samples.jsonl. `evaluate_every` = 0: no evaluation at all.

    planted: text that the samples repeat, in pieces of three characters.
    """
    init, rho = (64, None) if strategy == "prune" else (None, 0.25 if strategy == "topd" else None)
    horizon = HorizonConfig(
        strategy, max_len=MAX_LEN, min_len=32, init_len=init, step=8, margin=8, finished_rows="hit_if_reliable", rho=rho
    )
    gate = GateConfig(w_base=0.0, w_drop=0.05) if strategy == "prune" else None
    config = TrainConfig(
        name, student, "models/teacher", steps, horizon, gate=gate, track=TrackConfig(wandb="disabled")
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    rng = random.Random(seed)
    with closing(MetricsLog(run_dir / FILE_NAME, keep_through=None)) as log:
        if evaluate_every:
            log.write(evaluation_record(0, steps, rng))
        for step in range(1, steps + 1):
            log.write(step_record(step, steps, strategy, rng, evaluated=evaluate_every > 0))
            if evaluate_every and (step % evaluate_every == 0 or step == steps):
                log.write(evaluation_record(step, steps, rng))
    with closing(MetricsLog(run_dir / samples.FILE_NAME, keep_through=None)) as log:
        for step in sorted({1, max(1, steps // 2), steps}):
            for kind in ("finished", "horizon", "stopped"):
                log.write(sample_record(step, kind, planted))
    return run_dir


def sample_record(step: int, kind: str, planted: str = "") -> dict[str, Any]:
    """A response of 40 numbered tokens and what is planted; a stopped one is cut after the event at token 30."""
    tokens = [f" word{i}" for i in range(40)] + [planted[i : i + 3] for i in range(0, len(planted), 3)]
    events = {"finished": [], "horizon": [7], "stopped": [7, 30]}[kind]
    cut = 31 if kind == "stopped" else len(tokens)
    return {
        "step": step,
        "row": {"finished": 0, "horizon": 5, "stopped": 9}[kind],
        "problem": 100 + step,
        "source": "ledger",
        "horizon": 64,
        "prompt": f"prompt of step {step}, {kind} {planted}",
        "tokens": tokens,
        "overlap": [0.25 if i in events else 1.0 for i in range(len(tokens))],
        "weight": [1.0 - 0.5 * sum(i >= event for event in events) for i in range(len(tokens))],
        "divergence": [0.01 * i for i in range(len(tokens))],
        "events": events,
        "reliable_length": cut,
        "finished": kind == "finished",
        "stopped": kind == "stopped",
        "dropped": 3 if kind == "stopped" else 0,
    }


def step_record(
    step: int, steps: int, strategy: str = "prune", rng: random.Random | None = None, *, evaluated: bool = True
) -> dict[str, Any]:
    """One step of the curve: horizon 64 → 216, overlap .78 → .92."""
    rng = rng or random.Random(step)
    done = step / max(1, steps)
    wanted = {"prune": 64 + 152 * max(0.0, done - 0.15) / 0.85, "topd": 0.25 * MAX_LEN}.get(strategy, MAX_LEN)
    horizon = 8 * round(wanted / 8)
    full_length = 300 - 50 * done
    length = min(horizon, full_length) * rng.uniform(0.92, 0.98)
    overlap = 0.78 + 0.14 * (1 - math.exp(-3 * done)) / (1 - math.exp(-3)) + rng.gauss(0, 0.006)
    reliable = min(length, length * (0.55 + 0.45 * done) * rng.uniform(0.93, 1.0))
    overlaps: list[float | None] = []
    weights: list[float | None] = []
    for i in range(BINS):
        start = i * MAX_LEN / BINS
        if start >= min(horizon, full_length * 1.3):
            overlaps.append(None)
            weights.append(None)
            continue
        overlaps.append(min(0.99, overlap + 0.05 - 0.10 * start / MAX_LEN * (2 - done) + rng.gauss(0, 0.008)))
        weights.append(max(0.0, 1 - start / max(1.0, reliable * 1.6)) if strategy == "prune" else 1.0)
    generated = round(RESPONSES * length)
    rollout, train = 0.5 + 0.011 * length, 0.8 + 0.014 * length
    sync, teacher = 0.35 + rng.uniform(0, 0.08), 0.2 + 0.004 * length
    return {
        "step": step,
        "horizon": horizon,
        "overlap": overlap,
        "event_rate": max(0.0, 0.26 - 0.20 * done + rng.gauss(0, 0.01)),
        "reliable_length": reliable,
        "response_length": length,
        "weight_mean": sum(w for w in weights if w is not None) / sum(w is not None for w in weights),
        "pruned_inflight": int(RESPONSES * 0.2 * (1 - done) * rng.random()) if strategy == "prune" else 0,
        "tokens_generated": generated,
        "tokens_trained": round(generated * 0.97),
        "tokens_full": round(RESPONSES * full_length) if evaluated else None,
        "loss": 0.021 * math.exp(-2 * done) * rng.uniform(0.85, 1.15) + 0.004,
        "divergence": 0.5 * math.exp(-2 * done),
        "reverse_kl": 0.6 * math.exp(-1.8 * done),
        "reverse_kl_by_position": [None if o is None else 0.6 * math.exp(-1.8 * done) for o in overlaps],
        "student_entropy": 1.6 - 0.4 * done,
        "teacher_entropy": 1.2,
        "support_mass": 0.9 + 0.05 * done,
        "support_mass_teacher": 0.93,
        "grad_norm": 0.9 * math.exp(-done) * rng.uniform(0.7, 1.4),
        "weight_norm": 232.4 - 0.01 * step,
        "lr": 1e-4,
        "lengths_by_position": [
            RESPONSES // 4 * (i * MAX_LEN // BINS < length < (i + 4) * MAX_LEN // BINS) for i in range(BINS)
        ],
        "padding_waste_padded": 0.18 + 0.2 * done + rng.gauss(0, 0.01),
        "padding_waste_packed": 0.002,
        "dp_imbalance": 1 + abs(rng.gauss(0, 0.004)),
        "finished_rate": max(0.0, min(1.0, (horizon / full_length - 0.4) * rng.uniform(0.9, 1.1))),
        "overlap_by_position": overlaps,
        "weight_by_position": weights,
        **{f"memory_{phase}": (40 + 10 * i) * 10**9 for i, phase in enumerate(("sync", "rollout", "teacher", "train"))},
        **{f"speed_{phase}": generated / seconds / 8 for phase, seconds in (("rollout", rollout), ("train", train))},
        **{f"flops_{phase}": 3e14 for phase in ("rollout", "teacher", "train", "step")},
        **{f"mfu_{phase}": 0.3 for phase in ("rollout", "teacher", "train", "step")},
        **{"planned_time_train": 0.9 * train, "planned_mfu_train": 0.33},
        **{"mismatch_mean": 0.01 + 0.002 * done, "mismatch_max": 0.4, "mismatch_mean_by_engine": [0.01, 0.012]},
        "time_sync": sync,
        "time_rollout": rollout,
        "time_teacher": teacher,
        "time_train": train,
        "time_step": sync + rollout + teacher + train + rng.uniform(0.05, 0.2),
    }


def evaluation_record(step: int, steps: int, rng: random.Random | None = None) -> dict[str, Any]:
    """Accuracy .06 → .70, as 256 problems would measure it."""
    rng = rng or random.Random(step)
    done = step / max(1, steps)
    accuracy = 0.06 + 0.64 * (1 - math.exp(-3.5 * done)) / (1 - math.exp(-3.5)) + rng.gauss(0, 0.012)
    return {
        "step": step,
        "eval_ledger": accuracy,
        "eval_ledger_stderr": math.sqrt(accuracy * (1 - accuracy) / 256),
        "eval_ledger_readable": (200 + round(50 * done)) / 256,
        "eval_ledger_answers": 256,
        "eval_response_length": 300 - 50 * done,
        "time_eval": 14.0 + rng.uniform(0, 2),
    }


def main(folder: Path) -> None:
    from prune_opd.track.report import write_report

    runs = [
        write_run(folder / "prune"),
        write_run(folder / "full", name="ledger-full", strategy="full", seed=1),
        write_run(folder / "topd", name="ledger-topd-0.25", strategy="topd", seed=2),
    ]
    write_report(runs[:1], runs[0] / "report.html")
    write_report(runs, folder / "comparison.html")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
