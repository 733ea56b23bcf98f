"""Which token ids end a response for a model, and which it prefers: read from its Hugging Face directory.

Terminal ids are those of generation_config.json and config.json (`eos_token_id`), the tokenizer's own end
(tokenizer_config.json), and the special token that the chat template puts after an assistant's turn. A base model and a
chat model of one family often prefer different ones: Qwen3-1.7B-Base ends with 151643, Qwen3-4B with 151645. Then the
teacher expects no end where the student ends, and teaches it not to stop (arXiv 2609.20511).

Files are read as they are. No tokenizer is built, nothing heavy imported.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_opd.config import TrainConfig
from prune_opd.data.chat_template import chat_template, read_object, render, token_text

GENERATION = "generation_config.json"
_MARK = "the-words-of-an-assistant"


@dataclass(frozen=True)
class Ends:
    """The ids that end a response for a model.

    ids: all of them, ascending; empty where none could be read. stops: those at which an engine stops by itself, all
    but the chat template's. preferred: the one that it ends with itself: the tokenizer's, else the first of
    generation_config.json, else that of config.json.
    """

    ids: tuple[int, ...]
    stops: tuple[int, ...]
    preferred: int | None


def model_ends(directory: Path) -> Ends:
    """The ends of a Hugging Face directory. A file that is missing or broken says nothing."""
    tokenizer = read_object(directory / "tokenizer_config.json")
    names = _names(read_object(directory / "tokenizer.json"))
    end = names.get(token_text(tokenizer.get("eos_token")))
    generation, config = (
        _ids(read_object(directory / name).get("eos_token_id")) for name in (GENERATION, "config.json")
    )
    own = [] if end is None else [end]
    template = _template_end(directory, names)
    ordered = [*own, *generation, *config, *([] if template is None else [template])]
    stops = tuple(sorted({*own, *generation, *config}))
    return Ends(tuple(sorted(set(ordered))), stops, ordered[0] if ordered else None)


def terminal_ids(config: TrainConfig, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a response for a run's student or for a teacher of it, ascending; of `vocab_size` all know.

    Those of the chat templates only with `objective.ends = class`: as it is, no engine stops there.
    """
    union = _union((config.student, *config.teacher_paths), config.objective.ends == "class")
    return tuple(i for i in union if i < vocab_size)


def end_class(config: TrainConfig, vocab_size: int) -> tuple[int, ...]:
    """The terminal ids that a run takes for one outcome; empty with `objective.ends = as_is`."""
    return terminal_ids(config, vocab_size) if config.objective.ends == "class" else ()


def write_ends(directory: Path, ids: tuple[int, ...]) -> None:
    """Make every one of `ids` an end of the model in `directory`, beside its own: vLLM and transformers stop there."""
    path = directory / GENERATION
    settings = read_object(path)
    own = _ids(settings.get("eos_token_id")) or _ids(read_object(directory / "config.json").get("eos_token_id"))
    settings["eos_token_id"] = list(dict.fromkeys([*own, *ids]))
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@functools.cache
def _union(models: tuple[str, ...], templates: bool) -> tuple[int, ...]:
    """Cached: a tokenizer.json may have megabytes, and the loss asks at every step."""
    ends = [model_ends(Path(directory)) for directory in models]
    return tuple(sorted({i for each in ends for i in (each.ids if templates else each.stops)}))


# ---------------------------------------------------------------------------------------------------- files


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool) and i >= 0]


def _names(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """The ids of a tokenizer.json's special tokens, by their text."""
    added = tokenizer.get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return {
        token["content"]: token["id"]
        for token in tokens
        if token.get("special") and isinstance(token.get("content"), str) and isinstance(token.get("id"), int)
    }


def _template_end(directory: Path, names: Mapping[str, int]) -> int | None:
    """The id of the special token that a rendered assistant's turn ends with; None where there is none."""
    template = chat_template(directory)
    turns = [{"role": "user", "content": "words"}, {"role": "assistant", "content": _MARK}]
    rendered = template and render(directory, template, turns, add_generation_prompt=False)
    _, mark, after = (rendered or "").rpartition(_MARK)
    found = [name for name in names if mark and after.lstrip().startswith(name)]
    return names[max(found, key=len)] if found else None
