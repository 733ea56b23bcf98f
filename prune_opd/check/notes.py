"""What a recipe may well ask for and should know the price of: notes, which refuse nothing.

A note is one line: the settings, what follows from them, what to set if that is not meant. `prune-opd check` prints
them before its verdict and `prune-opd train` before it starts. Nothing heavy is imported.
"""

from __future__ import annotations

import json
from pathlib import Path

from prune_opd.check.elsewhere import cache_notes
from prune_opd.check.ends import end_notes
from prune_opd.check.template import template_notes
from prune_opd.config import TrainConfig
from prune_opd.config.teachers import by_source, own_names, teacher_of_source
from prune_opd.data.render import prompt_of
from prune_opd.data.rows import read_rows
from prune_opd.errors import ConfigError

RATIO_OBJECTIVES = ("topk_reverse_kl", "sampled_token")  # policy gradients: a ratio to the policy that sampled


def check_notes(config: TrainConfig) -> list[str]:
    """The notes on a run, a line each; a model directory that cannot be read has none (`check_train` refuses it)."""
    notes = _temperatures(config) + _nucleus(config) + _single_candidates(config)
    templates = any(_through_template(config, source) for source in config.data.sources)
    for name, own in config.by_teacher.items():
        student, teacher = map(Path, own.model_dirs.values())
        found = _own_teacher(own) + (template_notes(student, teacher, own.data) if templates else []) + end_notes(own)
        notes += [own_names(name, note) for note in found]
    notes += cache_notes(config) + _served(config) + _idle_teachers(config)
    return [f"note: {note}" for note in notes]


def _idle_teachers(config: TrainConfig) -> list[str]:
    """Teachers that no entry of the data has; rows of files may name theirs."""
    if config.data.teacher_column or any(Path(source).exists() for source in config.data.sources):
        return []
    taught = by_source(config.teachers)
    busy = {teacher_of_source(taught, source) for source in config.data.sources}
    return [
        f"teachers.{name} teaches none of the data's sources ({', '.join(config.data.sources)}): it is loaded and "
        "never asked; leave it out, or name what it teaches in its sources"
        for name in config.teachers
        if name not in busy
    ]


def _temperatures(config: TrainConfig) -> list[str]:
    sampled, of_loss = config.rollout.temperature, config.objective.temperature
    if sampled == of_loss:
        return []
    follows = "the loss is of another policy than the one that writes the responses, on text that it would seldom write"
    if config.objective.name == "sampled_token":
        follows = "the sampled tokens come from another policy than the loss is of, so its estimate of the KL is biased"
    return [
        f"rollout.temperature = {sampled:g} and objective.temperature = {of_loss:g}: {follows}; set both alike if that "
        "is not meant"
    ]


def _nucleus(config: TrainConfig) -> list[str]:
    top_p, objective, rollout = config.rollout.top_p, config.objective, config.rollout
    if top_p == 1:
        return []
    users = []
    if objective.name == "sampled_token":
        users.append("objective.name = sampled_token, an estimate over the whole vocabulary")
    if rollout.partial or rollout.reuses:
        name = "rollout.partial = true" if rollout.partial else f"rollout.refresh_every = {rollout.refresh_every}"
        users.append(f"{name}, whose ratio is of probabilities over the whole vocabulary")
    if config.optimizer.updates_per_batch > 1 and objective.name in RATIO_OBJECTIVES:
        users.append("optimizer.updates_per_batch > 1, whose ratio is of probabilities over the whole vocabulary")
    return [
        f"rollout.top_p = {top_p:g} with {user}: no token outside the nucleus is ever sampled, so it is biased and the "
        "student's tail is never corrected; set rollout.top_p=1"
        for user in users
    ]


def _single_candidates(config: TrainConfig) -> list[str]:
    objective, gate, weighting = config.objective, config.gate, config.weighting
    notes = []
    if objective.k == 1 and objective.name == "topk_reverse_kl":
        notes.append(
            "objective.k = 1 with objective.name = topk_reverse_kl: the one candidate has the whole weight, so the "
            "reward is log q − log p of the best token alone and no other token is seen (a KL of both renormalised on "
            "it would be 0); set objective.k=16, or objective.tail=bucket"
        )
    if objective.k == 1 and objective.name == "topk_forward_kl":
        notes.append(
            "objective.k = 1 with objective.name = topk_forward_kl: it is −log p of the teacher's best token, which is "
            "supervised training on its greedy choice and no distillation; set objective.k=16"
        )
    if gate is not None and gate.k == 1 and gate.metric == "overlap":
        notes.append(
            f"gate.k = 1 with gate.metric = overlap: overlap is 0 or 1, so every token whose best token is not the "
            f"teacher's is an event whatever gate.threshold = {gate.threshold:g} is; set gate.k=16 for a threshold"
        )
    if weighting.name in ("entropy_aware", "tropd") and weighting.forward_k == 1:
        notes.append(
            "weighting.forward_k = 1: the added forward KL is −log p of the teacher's best token, on the tokens where "
            "it is least sure of it; set weighting.forward_k=16"
        )
    return notes


def _own_teacher(config: TrainConfig) -> list[str]:
    if config.model_dirs["teacher"] != config.student or config.data.teacher_prompt is not None:
        return []
    return [
        f"teacher = {config.teacher} with data.teacher_prompt = null: it reads what the student reads, so it "
        "begins with nothing to teach; set data.teacher_prompt if that is no control"
    ]


def _served(config: TrainConfig) -> list[str]:
    """A server of another number format than the run's: vLLM takes the directory's unless it is told."""
    path = Path(config.model_dirs["teacher"], "config.json")
    if not config.teacher_server.on or not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    dtype = found.get("dtype") or found.get("torch_dtype")
    if config.precision.params != "fp32" or dtype in (None, "float32"):
        return []
    return [
        f"teacher_server.url with precision.params = fp32: a vLLM server takes {dtype} for {config.teacher}, as its "
        "config.json says; start it with --dtype float32 for the numbers of a teacher in the job"
    ]


def _through_template(config: TrainConfig, source: str) -> bool:
    """Whether the prompts of a source go through the chat template, where there is one."""
    if config.data.chat is not None or not Path(source).exists():
        return bool(config.data.chat)
    try:
        _, _, row = next(iter(read_rows(Path(source), config.data.split)))
        return not isinstance(row, ConfigError) and prompt_of(row)[0] != "prompt"
    except (ConfigError, StopIteration):  # another check names it
        return False
