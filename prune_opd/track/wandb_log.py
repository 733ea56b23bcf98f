"""wandb, kept at arm's length: offline by default, quiet, and never a reason for a run to stop.

wandb is imported when a run starts, not when this module is. The run's id lives in `<run_dir>/wandb/run_id`, so that a
resumed run continues the same wandb run. Known limit: wandb's step only goes forward. What a killed run had already
sent online past its last checkpoint stays there, and the server drops the resumed run's rows for those same steps.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prune_opd.config import TrackConfig
from prune_opd.track.metrics import Record
from prune_opd.track.samples import ending, spread, tokens_html

_INIT_TIMEOUT_S = 60.0
_SAMPLE_COLUMNS = [
    *("step", "row", "problem", "tokens", "mean overlap", "events"),
    *("reliable length", "ending", "prompt", "response"),
]
_CURVES_SHOWN = 8

Warn = Callable[[str], None]


class WandbRun:
    """A started wandb run, or none. After its first failure it says so once and does nothing any more."""

    def __init__(self, run: Any | None, warn: Warn) -> None:
        self._run = run
        self._warn = warn
        self._last: Record = {}
        self._curves: list[tuple[int, list[float | None]]] = []  # step, overlap by position

    def log(self, record: Record) -> None:
        """Sends one record of metrics.jsonl, under its own `step`."""
        self._last = record
        self._attempt("logging", lambda run: run.log(flatten(record), step=record["step"]))

    def log_samples(self, records: Sequence[Record]) -> None:
        """Sends lines of samples.jsonl, after the record of their step: a table, and the tokens coloured by overlap.

        Beside it, as a chart, overlap by position of this step and of those sampled before.
        """
        if not records:
            return
        step = records[0]["step"]
        if self._last.get("overlap_by_position"):
            self._curves.append((step, self._last["overlap_by_position"]))
        self._attempt("logging", lambda run: run.log(_samples(records) | _curve_chart(self._curves), step=step))

    def finish(self, exit_code: int = 0) -> None:
        """Closes the run. Safe to call twice."""
        self._attempt("finishing", lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _attempt(self, doing: str, action: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # whatever wandb raises, training goes on
            self._run = None
            self._warn(f"wandb stopped while {doing} ({_brief(error)}): the run goes on, metrics.jsonl has everything")


def start(
    run_dir: Path,
    config_dict: dict[str, Any],
    track: TrackConfig,
    name: str,
    *,
    resume: bool = True,
    warn: Warn,
) -> WandbRun:
    """Starts wandb for a run directory; never raises: online falls back to offline, and that to nothing.

    Args:
        run_dir: files go to `<run_dir>/wandb`.
        config_dict: the resolved configuration, shown as the wandb run's config.
        track: mode (offline, online, disabled), project, entity, group and tags.
        name: the run's display name.
        resume: continue the id stored in the run directory, if there is one; False takes a new id.
        warn: takes the one sentence about a failure.
    """
    if track.wandb == "disabled":
        return WandbRun(None, warn)
    modes = ["online", "offline"] if track.wandb == "online" else ["offline"]
    failures = []
    for mode in modes:
        try:
            run = _init(run_dir, config_dict, track, name, mode, _run_id(run_dir, resume))
        except Exception as error:  # import, network, disk, credentials: none of them is worth a training run
            failures.append(f"{mode}: {_brief(error)}")
            resume = True  # the id written for the first try serves the second
            continue
        if failures:
            warn(f"wandb could not start {failures[0]}: logging offline, `wandb sync` can send it later")
        return WandbRun(run, warn)
    warn(f"wandb could not start ({'; '.join(failures)}): the run goes on, metrics.jsonl has everything")
    return WandbRun(None, warn)


def flatten(record: Record) -> dict[str, float]:
    """The record as wandb's flat scalars: lists become one key a bin (`overlap_by_position/03`), nulls are left out."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if key == "step" or value is None:
            continue
        if isinstance(value, list | tuple):
            flat |= {f"{key}/{i:02d}": item for i, item in enumerate(value) if item is not None}
        else:
            flat[key] = value
    return flat


def _samples(records: Sequence[Record]) -> dict[str, Any]:
    """A table of the responses, and each as a page with its tokens in colour: a page in a cell would lie outside of the
    run directory, in the user's home."""
    import wandb

    rows = []
    for record in records:
        known = [value for value in record["overlap"] if value is not None]
        mean = sum(known) / len(known) if known else None
        place = (record["step"], record["row"], record["problem"], len(record["tokens"]))
        texts = (ending(record), record["prompt"], "".join(record["tokens"]))
        rows.append([*place, mean, len(record["events"]), record["reliable_length"], *texts])
    return {
        "samples": wandb.Table(columns=_SAMPLE_COLUMNS, data=rows),
        "samples_by_token": [wandb.Html(tokens_html(record), inject=False) for record in records],
    }


def _curve_chart(curves: Sequence[tuple[int, list[float | None]]]) -> dict[str, Any]:
    import wandb

    shown = [
        (step, [(i, v) for i, v in enumerate(curve) if v is not None]) for step, curve in spread(curves, _CURVES_SHOWN)
    ]
    shown = [(step, points) for step, points in shown if points]
    if not shown:
        return {}
    chart = wandb.plot.line_series(
        xs=[[place for place, _ in points] for _, points in shown],
        ys=[[value for _, value in points] for _, points in shown],
        keys=[f"step {step}" for step, _ in shown],
        title="Overlap by position",
        xname="position bin",
    )
    return {"overlap_by_position_curves": chart}


def _init(run_dir: Path, config_dict: dict[str, Any], track: TrackConfig, name: str, mode: Any, run_id: str) -> Any:
    import wandb

    # Without this, missing credentials would open a prompt on a terminal, and wait there with the GPUs held.
    if mode == "online" and not wandb.login(prompt=False):
        raise RuntimeError("no wandb credentials are configured")
    os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # vLLM imports openai, and wandb would advertise for it
    settings = wandb.Settings(silent=True, console="off", init_timeout=_INIT_TIMEOUT_S)
    return wandb.init(
        dir=str(run_dir),
        project=track.project,
        entity=track.entity,
        group=track.group,
        tags=list(track.tags) or None,
        name=name,
        id=run_id,
        resume="allow",
        mode=mode,
        config=config_dict,
        settings=settings,
    )


def _run_id(run_dir: Path, resume: bool) -> str:
    path = run_dir / "wandb" / "run_id"
    if resume and path.is_file() and (stored := path.read_text(encoding="utf-8").strip()):
        return stored
    path.parent.mkdir(parents=True, exist_ok=True)
    run_id = secrets.token_hex(4)
    temporary = path.with_name("run_id.tmp")
    temporary.write_text(run_id + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return run_id


def _brief(error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"[:200]
