"""The runs of the comparison that the repository keeps, a line each, so that the table grows from machine to machine.

A run takes minutes and the whole comparison many hours. `prune-opd bench keep` adds what `prune-opd bench strategies`
has finished to docs/strategies.jsonl. A line is compared only with full OPD of the same pair, seed and processor:
nothing absolute that depends on a processor is shown.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.strategies.plan import METHODS, method_config, pair_recipe
from prune_opd.config import HorizonConfig, TrainConfig, to_dict

KEPT = Path(__file__).resolve().parents[2] / "docs" / "strategies.jsonl"
Line = dict[str, Any]
# What a run's results do not depend on, or what differs from run to run by intention.
BESIDE = ("name", "student", "teacher", "seed", "evaluation", "checkpoint", "track", "planning", "survival", "parallel")


def settings_digest(config: TrainConfig) -> str:
    """A short hash of what a method is on a pair: its settings that differ from their defaults.

    So a setting that is new since changes nothing. A default that has changed does not show.
    """
    found = {key: value for key, value in to_dict(config).items() if key not in BESIDE}
    plain = to_dict(TrainConfig(name="", student="", teacher="any", steps=1, horizon=HorizonConfig("full")))
    return hashlib.blake2b(json.dumps(_differences(found, plain), sort_keys=True).encode(), digest_size=6).hexdigest()


def _differences(value: Any, plain: Any) -> Any:
    if not isinstance(value, dict) or not isinstance(plain, dict):
        return value
    return {key: _differences(part, plain.get(key)) for key, part in value.items() if part != plain.get(key)}


def read_kept(path: Path = KEPT) -> list[Line]:
    """The lines, in the order in which they came."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def keep(path: Path, lines: Iterable[Line]) -> int:
    """Add the runs that are not there yet: those of another pair, method, seed, settings or processor. Their number."""
    known = {_identity(line) for line in read_kept(path)}
    new = {identity: line for line in lines if (identity := _identity(line)) not in known}
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in new.values())
    return len(new)


def _identity(line: Line) -> tuple[str, ...]:
    return tuple(str(line[key]) for key in ("pair", "method", "seed", "settings", "processor"))


def valid(lines: Sequence[Line]) -> list[Line]:
    """The lines of methods and settings that there are now; a method that has changed since must run again."""
    now: dict[tuple[str, str], str] = {}
    methods = {method.name: method for method in METHODS}
    for pair, name in {(line["pair"], line["method"]) for line in lines}:
        if name in methods:
            now[pair, name] = settings_digest(method_config(pair_recipe(pair), methods[name]))
    return [line for line in lines if now.get((line["pair"], line["method"])) == line["settings"]]


def compared(lines: Sequence[Line], pair: str) -> dict[str, list[tuple[float, float, float, int]]]:
    """By method, for every run beside which full OPD has run: points to it, shares of tokens and of CPU seconds saved
    (sync left out), last window."""
    full = {(at["seed"], at["processor"]): at for at in lines if at["pair"] == pair and at["method"] == "full"}
    found: dict[str, list[tuple[float, float, float, int]]] = defaultdict(list)
    for line in lines:
        base = full.get((line["seed"], line["processor"]))
        if line["pair"] != pair or base is None:
            continue
        points = 100 * (line["accuracy"] - base["accuracy"])
        tokens = 1 - line["tokens_generated"] / base["tokens_generated"]
        found[line["method"]].append((points, tokens, 1 - _cost(line) / _cost(base), line["last_window"]))
    return dict(found)


def _cost(line: Line) -> float:
    return sum(float(line["cpu_s"][phase]) for phase in ("rollout", "teacher", "train"))


# ---------------------------------------------------------------------------------------------------- the table

HEAD = ("method", "seeds", "points to full OPD", "tokens saved", "CPU s saved", "last window", "front")


def table(lines: Sequence[Line], pair: str) -> str:
    """The pair's table as Markdown: means over seeds, points with their standard error, ● on the front.

    On the front: no other method has more points and saves more tokens, by the means.
    """
    found = compared(lines, pair)
    means = {name: [fmean(column) for column in zip(*runs, strict=True)] for name, runs in found.items()}
    rows = []
    for method in METHODS:
        if method.name not in found:
            continue
        runs, (points, tokens, cpu, window) = found[method.name], means[method.name]
        full = method.name == "full"
        beaten = any(other[0] > points and other[1] > tokens for other in means.values())
        error = f" ± {stdev(run[0] for run in runs) / math.sqrt(len(runs)):.1f}" if len(runs) > 1 else ""
        shown = ("", "", "") if full else (f"{points:+.1f}{error}", f"{tokens:.0%}", f"{cpu:.0%}")
        rows.append((method.title, str(len(runs)), *shown, f"{window:.0f}", "" if beaten else "●"))
    written = ["| " + " | ".join(cells).replace("  ", " ") + " |" for cells in (HEAD, *rows)]
    return "\n".join([written[0], "|---|" + "--:|" * (len(HEAD) - 1), *written[1:]])


def tables(path: Path = KEPT) -> str:
    """All pairs, for docs/comparison.md."""
    lines = valid(read_kept(path))
    pairs = dict.fromkeys(line["pair"] for line in lines)
    return "\n\n".join(f"**{pair}**\n\n{table(lines, pair)}" for pair in pairs)
