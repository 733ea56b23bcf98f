"""What the keys of metrics.jsonl mean, as documented in prune_opd/track/assets/metrics.yaml."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import prune_opd.track

METRICS: dict[str, str] = yaml.safe_load(
    (Path(prune_opd.track.__path__[0]) / "assets" / "metrics.yaml").read_text(encoding="utf-8")
)


def meaning(key: str) -> str | None:
    """The entry of a key as it is written (`eval_ledger` is `eval_<task>`), None if there is none."""
    if key in METRICS:
        return METRICS[key]
    pattern = re.sub(r"^eval_(.+?)(_stderr|_low|_high|_pass)?$", r"eval_<task>\2", key)
    return METRICS.get(pattern) if pattern != key else None
