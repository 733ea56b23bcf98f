"""Whether student and teacher end a response with the same token, and what to set where they do not.

A teacher that ends otherwise than its student expects no end where the student ends, and teaches it not to: the length
climbs to the budget (arXiv 2609.20511, Qwen3-1.7B-Base <- Qwen3-4B among its pairs). An id in common in the lists of
stop ids does not help, as that study measured: the loss has to know that both mean the same.
"""

from __future__ import annotations

from pathlib import Path

from prune_opd.config import TrainConfig
from prune_opd.data.ends import model_ends, terminal_ids

REMEDY = "set objective.ends=class, which makes all of them one outcome for both models"


def end_problems(config: TrainConfig, vocab_size: int) -> list[str]:
    """Settings that cannot be: no end in common as they are; a class without ids, or with too few other outcomes.

    vocab_size: ids that both models know.
    """
    if config.objective.ends == "class":
        return _class_problems(config, len(terminal_ids(config, vocab_size)), vocab_size)
    ours, theirs = (model_ends(Path(directory)).stops for directory in config.model_dirs.values())
    if not ours or not theirs or {*ours} & {*theirs}:
        return []
    return [
        f"teacher = {config.teacher!r} ends with the ids {[*theirs]} and the student with {[*ours]} (eos_token_id of "
        f"config.json and generation_config.json, tokenizer): {REMEDY}"
    ]


def end_notes(config: TrainConfig) -> list[str]:
    """What is allowed and has a known price: each model prefers another end, and each id is its own."""
    ours, theirs = (model_ends(Path(directory)).preferred for directory in config.model_dirs.values())
    if config.objective.ends == "class" or ours is None or theirs is None or ours == theirs:
        return []
    return [
        f"objective.ends = as_is: the student ends its responses with the id {ours} and the teacher with {theirs}, so "
        f"the student is taught not to stop (arXiv 2609.20511): {REMEDY}"
    ]


def _class_problems(config: TrainConfig, ids: int, vocab_size: int) -> list[str]:
    if not ids:
        return [
            f"objective.ends = class: neither student = {config.student!r} nor the teacher says which token ends a "
            "response; name it as eos_token_id in generation_config.json, or set objective.ends=as_is"
        ]
    outcomes = vocab_size - ids + 1
    sizes = {"objective.k": config.objective.k, "gate.k": config.gate.k if config.gate else 1}
    if config.weighting.name in ("entropy_aware", "tropd"):
        sizes["weighting.forward_k"] = config.weighting.forward_k
    return [
        f"{name} = {k} is above the {outcomes} outcomes that objective.ends = class leaves of vocab_size = "
        f"{vocab_size}: set it to at most {outcomes}"
        for name, k in sizes.items()
        if outcomes < k <= vocab_size
    ]
