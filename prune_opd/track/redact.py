"""Secrets stay out of what a run shows to others: its report, its samples, its wandb run.

A model may repeat what it was shown, and a path or a setting may contain a password. Masked are the values of this
process's secret variables (`WANDB_API_KEY`, `HF_TOKEN`, …), keys of well-known shapes, and passwords in addresses.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

MASK = "•"
_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)
_SHORTEST = 8  # characters; shorter values are left alone: masking a "false" would mask harmless text
_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bAKIA[A-Z0-9]{16}\b"
    r"|(?<=://)[^\s/:@]+:[^\s/@]+(?=@)"
)


def redact(text: str) -> str:
    """The text with every secret replaced by as many bullets as it has characters."""
    for first, last in _secrets(text):
        text = text[:first] + MASK * (last - first) + text[last:]
    return text


def redact_tokens(texts: Sequence[str]) -> list[str]:
    """`redact` for a text in pieces, which keep their lengths: a secret may extend over several of them."""
    hidden, kept, place = redact("".join(texts)), [], 0
    for text in texts:
        kept.append(hidden[place : place + len(text)])
        place += len(text)
    return kept


def _secrets(text: str) -> list[tuple[int, int]]:
    """The span of each secret: its first character, and one past its last."""
    values = {v for name, v in os.environ.items() if _SECRET_NAME.search(name) and len(v) >= _SHORTEST}
    found = [match.span() for value in values for match in re.finditer(re.escape(value), text)]
    return found + [match.span() for match in _SHAPES.finditer(text)]
