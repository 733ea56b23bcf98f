"""What has changed between a run and its continuation, field by field, and which changes are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prune_opd.config import TrainConfig
from prune_opd.config.yaml import config_differences, config_from_dict, load_config, parse
from prune_opd.errors import ConfigError

# Settings that may differ: they change neither the updates nor the problems of an evaluation.
HARMLESS = (
    "parallel",
    "track",
    "stop_after",
    "checkpoint",
    "survival",
    "evaluation.every",
    "evaluation.generations",
    "memory",
    "objective.kernels",
    "planning",
    "rollout.bucket_mb",
    "rollout.enforce_eager",
    "rollout.kv_cache_gb",
    "rollout.gpu_memory_utilization",
    "rollout.logprobs",
    "rollout.parity_every",
    "teacher_cache",
    "teacher_server.url",
    "teacher_server.concurrency",
    "teacher_server.timeout",
    "teacher_server.retries",
)
# What decides which tensors a checkpoint has: no flag lets a run go on with another.
IN_CHECKPOINTS = ("lora.rank", "lora.targets")
HARMLESS_OF_TEACHER = re.compile(r"teachers\.\w+\.parallel\.")
NOT_HARMLESS = ("parallel.distributed_optimizer",)  # its checkpoints consist of other parts


def changes(config: TrainConfig, run_dir: Path | None, resume: str) -> list[str]:
    """A line `field: old → new` for each setting that differs from the run that is resumed; none for a new run.

    The resumed run is the one in `run_dir` and, if `resume` is a path, the one that wrote that checkpoint. Raises
    `ConfigError` if its settings cannot be read.
    """
    found: list[str] = []
    if run_dir is not None and (run_dir / "config.yaml").is_file():
        path = run_dir / "config.yaml"
        found += config_differences(load_config(path), config)
        found += _other_meanings(parse(path.read_text(encoding="utf-8")), config)
    state = Path(resume) / "state.json"
    if resume not in ("auto", "never") and state.is_file():
        try:
            saved = json.loads(state.read_text(encoding="utf-8"))["config"]
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{state} cannot be read ({error!r}); resume from another checkpoint") from error
        found += config_differences(config_from_dict(TrainConfig, saved, state), config)
        found += _other_meanings(saved, config)
    return list(dict.fromkeys(found))


def _other_meanings(saved: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """Settings with the same value that meant something else in the version that wrote `saved`, as `changes` has them.

    A config without `objective.ends` is of before objective.weight=none became uniform.
    """
    objective = saved.get("objective") or {}
    if objective.get("weight") == "none" == config.objective.weight and "ends" not in objective:
        return ["objective.weight: none (1 for each id, an older version's) → none (1/|support|)"]
    return []


def is_harmless(change: str) -> bool:
    """Whether the run stays the same run with this change (a line of `changes`)."""
    key = change.partition(":")[0]
    if HARMLESS_OF_TEACHER.match(key):
        return True
    return key not in NOT_HARMLESS and any(key == name or key.startswith(f"{name}.") for name in HARMLESS)


def adapter_problem(found: Sequence[str]) -> str | None:
    """Why a run cannot go on with these changes (lines of `changes`): its checkpoints have other tensors; or None."""
    refused = [change for change in found if change.partition(":")[0] in IN_CHECKPOINTS]
    if not refused:
        return None
    return (
        f"{'; '.join(refused)}: a checkpoint has the adapters of its lora.rank and lora.targets, or every weight, and "
        "cannot be loaded with others; leave them as they were, or export that run (prune-opd export) and start "
        "another one from there (student=DIR) in another directory"
    )
