"""The runs of the comparison that the repository keeps, a line each, so that the table grows from machine to machine.

A run takes minutes and the whole comparison many hours. `prune-opd bench keep` adds what `prune-opd bench strategies`
has finished to docs/strategies.jsonl. A line is compared only with full OPD of the same pair, seed and processor, whose
engines were compiled alike: nothing absolute that depends on a processor is shown. A seed counts once, whatever the
number of machines that ran it: with the shipped models it is the same run on all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import mean_and_error
from benchmarks.strategies.plan import COST, METHODS, Method, method_config, pair_recipe
from prune_opd.config import HorizonConfig, TrainConfig, to_dict

KEPT = Path(__file__).resolve().parents[2] / "docs" / "strategies.jsonl"
EVERY = 5  # steps between the points of a kept curve
Line = dict[str, Any]
# What a run's results do not depend on, or what differs from run to run by intention.
BESIDE = ("name", "student", "teacher", "seed", "evaluation", "checkpoint", "track", "planning", "survival", "parallel")


def settings_digest(config: TrainConfig) -> str:
    """A short hash of what a method is on a pair: its settings that differ from their defaults.

    So a setting that is new since changes nothing. A default that has changed does not show.
    """
    found = {key: value for key, value in to_dict(config).items() if key not in BESIDE}
    found["rollout"].pop("enforce_eager")  # a compiled engine makes the same tokens
    found["data"]["mixture"] = tuple(Path(source).name for source in config.data.mixture)  # wherever they lie
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
    """Add the runs that are not there yet: those with another `identity`. Their number."""
    known = {identity(line) for line in read_kept(path)}
    new = {own: line for line in lines if (own := identity(line)) not in known}
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in new.values())
    return len(new)


RUN, MACHINE = ("pair", "method", "seed", "settings"), ("processor", "compiled")


def identity(line: Line, keys: Sequence[str] = (*RUN, *MACHINE)) -> tuple[str, ...]:
    """What tells a run from all others; `RUN` alone: from all but the same run on another machine."""
    return tuple(str(line.get(key, False)) for key in keys)


def valid(lines: Sequence[Line]) -> list[Line]:
    """The lines of methods and settings that there are now; a method that has changed since must run again."""
    now: dict[tuple[str, str], str] = {}
    methods = {method.name: method for method in METHODS}
    for pair, name in {(line["pair"], line["method"]) for line in lines}:
        if name in methods:
            now[pair, name] = settings_digest(method_config(pair_recipe(pair), methods[name]))
    return [line for line in lines if now.get((line["pair"], line["method"])) == line["settings"]]


@dataclass(frozen=True)
class Compared:
    """A run beside full OPD of its seed. points: of accuracy above it. tokens, cpu: shares of its tokens and of its CPU
    seconds that were saved (sync left out). line: the run's own."""

    points: float
    tokens: float
    cpu: float
    line: Line


def compared(lines: Sequence[Line], pair: str) -> dict[str, dict[int, Compared]]:
    """By method and seed, every run beside which full OPD has run; of a seed that ran on several machines the last."""
    full = {_machine(at): at for at in lines if at["pair"] == pair and at["method"] == "full"}
    found: dict[str, dict[int, Compared]] = defaultdict(dict)
    for line in lines:
        base = full.get(_machine(line))
        if line["pair"] != pair or base is None:
            continue
        points = 100 * (line["accuracy"] - base["accuracy"])
        tokens = 1 - line["tokens_generated"] / base["tokens_generated"]
        found[line["method"]][line["seed"]] = Compared(points, tokens, 1 - _cost(line) / _cost(base), line)
    return dict(found)


def _machine(line: Line) -> tuple[int, str, bool]:
    return line["seed"], line["processor"], line.get("compiled", False)


def _cost(line: Line) -> float:
    return sum(float(line["cpu_s"][phase]) for phase in COST)


# ---------------------------------------------------------------------------------------------------- the table

HEAD = ("method", "seeds", "points to full OPD", "tokens saved", "CPU s saved", "last window", "front")


@dataclass(frozen=True)
class Row:
    """A method's runs on a pair: means over seeds. error: standard error of `points`; None for one seed. front: no
    other method has more points and saves more tokens, by the means."""

    method: Method
    runs: dict[int, Compared]
    points: float
    error: float | None
    tokens: float
    cpu: float
    window: float
    front: bool


def rows(lines: Sequence[Line], pair: str) -> list[Row]:
    """The methods that have run on the pair, in the comparison's order."""
    found = compared(lines, pair)
    means = {
        name: (fmean(run.points for run in runs.values()), fmean(run.tokens for run in runs.values()))
        for name, runs in found.items()
    }
    made = []
    for method in METHODS:
        if method.name not in found:
            continue
        runs, (points, tokens) = found[method.name], means[method.name]
        own = list(runs.values())
        made.append(
            Row(
                method,
                runs,
                *mean_and_error([run.points for run in own]),
                tokens,
                fmean(run.cpu for run in own),
                fmean(run.line["last_window"] for run in own),
                not any(other[0] > points and other[1] > tokens for other in means.values()),
            )
        )
    return made


def table(lines: Sequence[Line], pair: str) -> str:
    """The pair's table as Markdown: means over seeds, points with their standard error, ● on the front."""
    written = [f"| {' | '.join(line)} |".replace("  ", " ") for line in (HEAD, *map(cells, rows(lines, pair)))]
    return "\n".join([written[0], "|---|" + "--:|" * (len(HEAD) - 1), *written[1:]])


def cells(row: Row) -> tuple[str, ...]:
    """A method's row as text, in the order of `HEAD`."""
    error = "" if row.error is None else f" ± {row.error:.1f}"
    shown = (f"{row.points:+.1f}{error}", f"{row.tokens:.0%}", f"{row.cpu:.0%}")
    own = ("", "", "") if row.method.name == "full" else shown
    return row.method.title, str(len(row.runs)), *own, f"{row.window:.0f}", "●" if row.front else ""


def tables(path: Path = KEPT) -> str:
    """All pairs, for docs/comparison.md."""
    lines = valid(read_kept(path))
    pairs = dict.fromkeys(line["pair"] for line in lines)
    return "\n\n".join(f"**{pair}**\n\n{table(lines, pair)}" for pair in pairs)
