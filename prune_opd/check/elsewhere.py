"""A teacher that is not in the job: whether its rows' folder has room and rows, and whether its server answers."""

from __future__ import annotations

import http.client
import json
import shutil
import urllib.request
from pathlib import Path

from prune_opd.check.machine import writable_problems
from prune_opd.config import TrainConfig
from prune_opd.errors import ConfigError
from prune_opd.model_spec import ModelSpec, model_config
from prune_opd.plan.setting import WEIGHT_BYTES


def cache_folder_problems(config: TrainConfig) -> list[str]:
    """A line for each; none without a cache. Nothing is written, and no row is read."""
    cache = config.teacher_cache
    if cache.dir is None or not cache.on:
        return []
    field, folder = f"teacher_cache.dir = {cache.dir!r}", Path(cache.dir).expanduser()
    rows = list(folder.glob("*/??/*.safetensors")) if folder.is_dir() else []
    if cache.mode == "only":
        if rows:
            return []
        return [f"teacher_cache.mode = only and {field} has no rows: run once with teacher_cache.mode=use"]
    if problems := writable_problems("teacher_cache.dir", folder):
        return problems
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free, held = shutil.disk_usage(there).free, sum(path.stat().st_size for path in rows)
    if cache.max_gb * 1e9 - held > free:
        return [
            f"teacher_cache.max_gb = {cache.max_gb:g} with {field}: {free / 1e9:.1f} GB are free and the rows there "
            f"take {held / 1e9:.1f} GB: set at most teacher_cache.max_gb={(free + held) / 1e9:.1f}, or another folder"
        ]
    return []


ANSWER_SECONDS = 10.0


def server_problems(config: TrainConfig) -> list[str]:
    """A line where the teacher's server does not answer, serves another model by its name, or takes too few tokens.

    Which weights it has is found out when a run starts: that reads all of the teacher's files.
    """
    server = config.teacher_server
    if server.url is None or config.teacher_cache.mode == "only":
        return []
    field, problems = f"teacher_server.url = {server.url!r}", []
    if server.model is None and not any(Path(config.model_dirs["teacher"]).glob("*.safetensors")):
        problems.append(
            f"{field} and teacher = {config.teacher!r} has no .safetensors files, so nobody can say which weights the "
            "server should have: set teacher_server.model to the name that it serves"
        )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(server.url.rstrip("/") + "/v1/models", timeout=ANSWER_SECONDS) as answer:
            served = {str(model["id"]): model.get("max_model_len") for model in json.load(answer)["data"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, http.client.HTTPException) as reason:
        return [*problems, f"{field} does not answer as a vLLM server does ({reason!r}): start it, make serve-teacher"]
    if server.model is not None and server.model not in served:
        problems.append(
            f"{field} serves {', '.join(served) or 'nothing'} and teacher_server.model = {server.model!r}: set one of "
            "these, or start another server (make serve-teacher)"
        )
    needed = config.teacher_prompt_limit + config.horizon.max_len + 1
    problems += [
        f"{field} takes {room} tokens of {name}, and a teacher's prompt + horizon.max_len + 1 may have {needed}: start "
        "it with a larger --max-model-len, or shorten one of them"
        for name, room in served.items()
        if isinstance(room, int) and room < needed and server.model in (None, name)
    ]
    return problems


def cache_notes(config: TrainConfig) -> list[str]:
    """Where a run's rows may not all fit: the oldest would be gone before the next run asks for them."""
    cache = config.teacher_cache
    if cache.mode != "use":
        return []
    try:
        teacher = ModelSpec.of(model_config("teacher", config.model_dirs["teacher"]), config.teacher)
    except ConfigError:
        return []  # another check names it
    rows = config.steps * config.rollout.prompts * config.rollout.responses
    needed = rows * config.horizon.max_len * teacher.hidden * WEIGHT_BYTES[config.precision.params]
    notes = []
    if config.rollout.refresh_every != 0:
        notes.append(
            f"teacher_cache.mode = use with rollout.refresh_every = {config.rollout.refresh_every}: the student moves, "
            "so only a run that repeats this one meets a row again; rollout.refresh_every=0 keeps the rollouts"
        )
    if needed > cache.max_gb * 1e9:
        notes.append(
            f"teacher_cache.max_gb = {cache.max_gb:g}: the rows of {config.steps} steps take up to "
            f"{needed / 1e9:.3g} GB, and the first ones go out for the last; raise it where another run shall meet all"
        )
    return notes
