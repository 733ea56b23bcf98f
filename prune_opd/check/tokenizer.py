"""Whether two models share a tokenizer, and have a row for each of its tokens: the teacher scores the student's ids.

Reads tokenizer.json and the config files as they are: no tokenizer is built, nothing heavy imported. A token that only
tokenizer_config.json or added_tokens.json names counts: transformers adds it, and encodes its text as one token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prune_opd.data.chat_template import read_object, token_text

# transformers' names of special tokens, in its order.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def tokenizer_problems(student: Path, teacher: Path) -> list[str]:
    """How the tokenizers of two model directories differ: tokens by id, merges, special tokens."""
    ours, theirs = (path / "tokenizer.json" for path in (student, teacher))
    try:
        files = [json.loads(path.read_bytes()) for path in (ours, theirs)]
        tokens = [_all_tokens(file, path) for file, path in zip(files, (student, teacher), strict=True)]
        difference = _difference(files[0], files[1], tokens)
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        return [f"student and teacher: a tokenizer.json cannot be read ({error!r}); give fast tokenizers"]
    if difference is None:
        return []
    return [
        f"teacher = {str(teacher)!r} has another tokenizer than the student: {difference};"
        " choose a pair that shares its tokenizer"
    ]


def vocabulary_problems(role: str, directory: Path, vocab_size: int, other: int) -> list[str]:
    """Problems where the model has too few rows for its own tokens, or for what the student may sample.

    vocab_size, other: of the model's and of the student's config.json. Padding over TP ranks makes no row for an id.
    """
    problems = []
    try:
        largest = max(_all_tokens(json.loads((directory / "tokenizer.json").read_bytes()), directory), default=0)
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        largest = 0  # `tokenizer_problems` names what cannot be read
    if largest >= vocab_size:
        problems.append(
            f"{role} = {str(directory)!r}: its tokenizer has the id {largest} and its config.json vocab_size = "
            f"{vocab_size}: copy tokenizer and config of one and the same model"
        )
    elif vocab_size < other:
        problems.append(
            f"{role} = {str(directory)!r}: it has rows for {vocab_size} ids, and the student may sample {other}: "
            "choose a teacher of at least the student's vocab_size"
        )
    return problems


def _difference(student: dict[str, Any], teacher: dict[str, Any], tokens: list[dict[int, str]]) -> str | None:
    """The first difference in vocabulary (by id), merges or special tokens, as a clause of a sentence."""
    for i in sorted(tokens[0].keys() | tokens[1].keys()):
        ours, theirs = (f"{names[i]!r}" if i in names else "unused" for names in tokens)
        if ours != theirs:
            return f"id {i} is {ours} for the student and {theirs} for the teacher"
    merges = [_merges(tokenizer) for tokenizer in (student, teacher)]
    if merges[0] != merges[1]:
        pairs = enumerate(zip(*merges, strict=False))
        i = next((i for i, (mine, other) in pairs if mine != other), min(map(len, merges)))
        ours, theirs = (" + ".join(merge[i]) if i < len(merge) else "missing" for merge in merges)
        return f"merge {i} is {ours} for the student and {theirs} for the teacher"
    added = [tokenizer.get("added_tokens") or [] for tokenizer in (student, teacher)]
    special = [{int(token["id"]) for token in those if token.get("special")} for those in added]
    if special[0] != special[1]:
        i = min(special[0] ^ special[1])
        who = "student" if i in special[0] else "teacher"
        return f"id {i} ({tokens[0][i]!r}) is a special token for the {who} only"
    return None


def _tokens(tokenizer: dict[str, Any]) -> dict[int, str]:
    """Id → token, of a tokenizer.json."""
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, dict):
        tokens = {int(i): token for token, i in vocabulary.items()}
    else:  # unigram: [token, score] in the order of ids
        tokens = {i: str(entry[0]) for i, entry in enumerate(vocabulary)}
    return tokens | {int(token["id"]): token["content"] for token in tokenizer.get("added_tokens") or []}


def _all_tokens(tokenizer: dict[str, Any], directory: Path) -> dict[int, str]:
    """Id → token, with those that transformers adds because the files beside tokenizer.json name them.

    Such a token gets the next free id, whatever number it has there.
    """
    tokens = _tokens(tokenizer)
    known = {*tokens.values()}
    for token in _named_tokens(directory):
        if token and token not in known:
            tokens[max(tokens, default=-1) + 1] = token
            known.add(token)
    return tokens


def _named_tokens(directory: Path) -> Iterator[str]:
    """The tokens of the files beside tokenizer.json, in the order in which transformers adds them."""
    settings = read_object(directory / "tokenizer_config.json")
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if "added_tokens_decoder" in settings:
        numbered = {int(i): token_text(token) for i, token in settings["added_tokens_decoder"].items()}
    else:  # older versions' files count
        old = read_object(directory / "special_tokens_map.json")
        further = old.pop("extra_special_tokens", None) or []
        extra = [*extra, *further] if isinstance(extra, list) and isinstance(further, list) else further or extra
        extra = extra or old.pop("additional_special_tokens", None) or []
        settings |= old
        numbered = {i: token for token, i in read_object(directory / "added_tokens.json").items()}
    yield from (numbered[i] for i in sorted(numbered))
    yield from (token_text(settings.get(name)) for name in NAMED)
    own = {name: token for name, token in settings.items() if name.endswith("_token") and name not in NAMED}
    named, listed = (extra, []) if isinstance(extra, dict) else ({}, extra)
    own = own | named or settings.get("model_specific_special_tokens") or {}
    yield from map(token_text, [*own.values(), *listed])


def _merges(tokenizer: dict[str, Any]) -> list[tuple[str, ...]]:
    """Merges are written as "a b" by old versions of tokenizers and as ["a", "b"] by new ones."""
    merges = tokenizer["model"].get("merges") or []
    return [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in merges]
