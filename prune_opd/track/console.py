"""What rank 0 shows of a run: a live progress display on a terminal, one plain line a step anywhere else."""

from __future__ import annotations

import io
import math
import sys
from collections import deque
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TextIO

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from prune_opd.config.run import READERS, REGEX
from prune_opd.process import watch
from prune_opd.track.metrics import PHASES, Record, full_kl, readable, task_names, total
from prune_opd.track.moving import PLAIN, TERMINAL, Moving, is_terminal
from prune_opd.track.summary import Summary, summarise

_ALONE = {"evaluation": "evaluating …", "export": "exporting the student …"}
_PLAIN_WIDTH = 100
_ETA_WINDOW = 20  # steps whose mean time predicts the rest
_PHASE_STYLES = dict(zip(PHASES.values(), ("cyan", "blue", "red", "magenta", "yellow"), strict=True)) | {
    "other": "bright_black",
    "evaluation": "green",
}


class RunConsole:
    """The console of one training process. `close` it, so that the display ends with the run.

    Args:
        name: the run's name.
        total_steps: the steps of the whole run.
        first_step: number of the first step this process will take: 1, or one past the checkpoint it resumed from.
        history: the step records already taken, for the cumulative figures of a resumed run.
        file: where to write; standard output by default. Control codes go to terminals only.
        log: a file that gets every plain line too, with its time.
    """

    def __init__(
        self,
        name: str,
        total_steps: int,
        first_step: int = 1,
        *,
        history: Sequence[Record] = (),
        file: TextIO | None = None,
        log: Path | None = None,
    ) -> None:
        self._log = log.open("a", encoding="utf-8") if log else None
        self._name = name
        self._total = total_steps
        self._done = max(0, first_step - 1)
        self._file = file or sys.stdout
        estimated = [r for r in history if r.get("tokens_full")]
        self._generated = total(estimated, "tokens_generated")
        self._full = total(estimated, "tokens_full")
        self._recent: deque[float] = deque((r["time_step"] for r in history if r.get("time_step")), _ETA_WINDOW)
        self._live: Live | None = None
        self._phase = ""
        self._below: tuple[Text, ...] = ()  # of the last step
        self._moving = Moving(self._moved, TERMINAL if self._is_terminal() else PLAIN)
        watch(self._moving)
        if self._is_terminal():
            self._start_live()

    def step(self, record: Record) -> None:
        """Shows a finished step."""
        self._done = record["step"]
        if record.get("tokens_full"):
            self._generated += record.get("tokens_generated") or 0
            self._full += record["tokens_full"]
        if record.get("time_step"):
            self._recent.append(record["time_step"])
        if self._live is None:
            self._line(self._plain_step(record))
        else:
            self._keep(self._plain_step(record))
            self._progress.update(self._task, completed=self._done, eta=self._eta())
            self._below = (self._figures(record), self._phase_line(record))
            self._draw()

    def evaluation(self, record: Record) -> None:
        """Shows the accuracies of an evaluation, above the progress display."""
        parts, notes = [f"evaluation after step {record['step']}:"], []
        for task in task_names(record):
            accuracy, error = record[f"eval_{task}"], record.get(f"eval_{task}_stderr")
            counts = readable(record, f"eval_{task}_")
            notes += unreadable_notes(task, counts)
            if accuracy is not None:
                parts.append(
                    f"{task} {accuracy:.1%}"
                    + (f" +- {error:.1%}" if error is not None else "")
                    + (f" ({readable_answers(counts)})" if counts is not None else "")
                )
        if record.get("eval_response_length") is not None:
            parts.append(f"response {record['eval_response_length']:.0f} tokens")
        if record.get("time_eval") is not None:
            parts.append(duration(record["time_eval"]))
        self._say(Text("  ".join(parts), style="bold green"))
        for note in notes:
            self._say(Text(note, style="yellow"))

    def note(self, text: str) -> None:
        """Shows a sentence, above the progress display."""
        self._say(Text(text, style="bright_black"))

    def phase(self, name: str) -> None:
        """Shows what the ranks do now: on a terminal always, in plain lines only what has no step of its own.

        What takes longer is then followed by how far it is (`process.progress`).
        """
        self._phase = name
        self._moving.begin()
        if self._live is not None:
            self._progress.update(self._task, phase=name)
            self._draw()
        elif name in _ALONE:
            self._line(_ALONE[name])

    def summary(self, steps: list[Record], evaluations: list[Record], failed: bool = False) -> None:
        """Ends the progress display and shows the run's totals, under a title that says whether it is finished."""
        self.close()
        table = summary_table(steps, evaluations)
        table.title = outcome(steps[-1]["step"] if steps else 0, self._total, failed)
        if self._is_terminal():
            self._keep(str(table.title))
            Console(file=self._file).print(table)
        else:
            page = Console(
                file=io.StringIO(), width=_PLAIN_WIDTH, force_terminal=False, color_system=None, no_color=True
            )
            table.box = box.ASCII2
            with page.capture() as captured:
                page.print(table)
            for line in captured.get().splitlines():
                self._line(line.rstrip())

    def keep(self, lines: Sequence[str]) -> None:
        """Puts lines that were printed already into the log."""
        for line in lines:
            self._keep(line)

    def end_log(self) -> None:
        """Nothing goes into the log any more. Safe to call twice."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def close(self) -> None:
        """Ends the progress display. Safe to call twice."""
        watch(None)
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _moved(self, text: str) -> None:
        if self._live is not None:
            self._draw(text)
        else:
            alone = self._phase in _ALONE or self._done >= self._total
            step = "" if alone else f"step {self._done + 1}/{self._total}  "
            self._line(f"{step}{self._phase}: {text}")

    # ---------------------------------------------------------------------------------------------- terminal

    def _start_live(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}", markup=True),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA {task.fields[eta]}"),
            TextColumn("[bright_black]{task.fields[phase]}", markup=True),
        )
        # rich reads markup in descriptions: a bracket in a run's name is not one.
        description = self._name.replace("[", r"\[")
        self._task: TaskID = self._progress.add_task(
            description, total=self._total, completed=self._done, eta=self._eta(), phase=""
        )
        self._live = Live(self._progress, console=Console(file=self._file), refresh_per_second=2, transient=False)
        self._live.start()

    def _draw(self, moving: str = "") -> None:
        """The bar, below it what moves within the phase, and the figures of the last step."""
        assert self._live is not None
        within = [Text(f"  {self._phase}: {moving}", style="bright_black")] if moving else []
        self._live.update(Group(self._progress, *within, *self._below))

    def _figures(self, record: Record) -> Text:
        text = Text("  ")
        for label, value in self._values(record):
            text.append(f"{label} ", style="bright_black").append(value, style="bold").append("   ")
        return text

    def _phase_line(self, record: Record) -> Text:
        text = Text("  ")
        for label, seconds, share in _phase_shares(record):
            text.append("━" * max(1, round(24 * share)), style=_PHASE_STYLES[label])
            text.append(f" {label} {seconds:.1f} s ", style="bright_black")
        return text

    def _say(self, text: Text) -> None:
        if self._live is None:
            self._line(text.plain)
        else:
            self._keep(text.plain)
            self._live.console.print(text)

    def _is_terminal(self) -> bool:
        return is_terminal(self._file)

    # ------------------------------------------------------------------------------------------------- plain

    def _plain_step(self, record: Record) -> str:
        width = len(str(self._total))
        parts = [f"step {record['step']:>{width}}/{self._total}"]
        parts += [f"{label} {value}" for label, value in self._values(record)]
        if record.get("time_step"):
            split = ", ".join(f"{label} {share:.0%}" for label, _, share in _phase_shares(record))
            parts.append(f"{record['time_step']:.1f} s" + (f" ({split})" if split else ""))
        return "  ".join([*parts, f"eta {self._eta()}"])

    def _keep(self, text: str) -> None:
        """A line for the log."""
        if self._log is not None:
            print(f"{datetime.now().isoformat(sep=' ', timespec='seconds')}  {text}", file=self._log, flush=True)

    def _line(self, text: str) -> None:
        self._keep(text)
        # A log file in an 8-bit encoding must not end a run over one arrow.
        encoding = getattr(self._file, "encoding", None) or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), file=self._file, flush=True)

    # ------------------------------------------------------------------------------------------------ shared

    def _values(self, record: Record) -> list[tuple[str, str]]:
        formats = (
            ("horizon", "horizon", "{}"),
            ("overlap", "overlap", "{:.3f}"),
            ("events", "event_rate", "{:.1%}"),
            ("reward", "reward", "{:.3f}"),
        )
        values = [(label, form.format(record[key])) for label, key, form in formats if record.get(key) is not None]
        for label, value in (("loss", record.get("loss")), ("full KL", full_kl(record))):
            if value is not None:
                values.append((label, f"{value:.3g}"))
        if self._full:
            values.append(("saved", f"{1 - self._generated / self._full:.1%}"))
        if record.get("time_step") and record.get("tokens_generated"):
            values.append(("speed", f"{record['tokens_generated'] / record['time_step']:,.0f} tokens/s"))
        return values

    def _eta(self) -> str:
        remaining = max(0, self._total - self._done)
        if not self._recent:
            return "?" if remaining else duration(0)
        return duration(remaining * sum(self._recent) / len(self._recent))


def outcome(step: int, total: int, failed: bool) -> str:
    """Whether a run is finished, in words that cannot be taken for success where it is not."""
    if failed:
        return f"FAILED after {step} of {total} steps"
    return f"{step} steps" if step >= total else f"STOPPED after {step} of {total} steps, not finished"


def summary_table(steps: list[Record], evaluations: list[Record]) -> Table:
    """A run's totals as a rich table: accuracy before and after, tokens against the full horizon, seconds by phase."""
    summary = summarise(steps, evaluations)
    table = Table(title=f"{summary.steps} steps", title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="bright_black", no_wrap=True)
    table.add_column()
    for name, value in summary_rows(summary):
        table.add_row(Text(name), Text(value))
    return table


def summary_rows(summary: Summary) -> list[tuple[str, str]]:
    """The rows of the summary as plain text, shared by the console and the report."""
    rows = []
    for accuracy in summary.accuracy:
        text = _percent(accuracy.before, accuracy.before_stderr)
        if accuracy.after is not None:
            text += f" → {_percent(accuracy.after, accuracy.after_stderr)}"
            text += f"  (step {accuracy.first_step} → {accuracy.last_step})"
        else:
            text += f"  (step {accuracy.first_step} only)"
        rows.append((f"accuracy, {accuracy.task}", text))
        if counts := [f"{n} of {m}" for n, m in filter(None, (accuracy.readable_before, accuracy.readable_after))]:
            rows.append((f"answers readable, {accuracy.task}", " → ".join(counts)))
    if summary.full_kl is not None:
        first, last = summary.full_kl
        rows.append(("full reverse KL to the teacher", f"{first:.3g} → {last:.3g} nats per token"))
    rows.append(("tokens generated", f"{summary.tokens_generated:,}"))
    if summary.tokens_full is not None and summary.saved is not None:
        rows.append(("tokens at the full horizon", f"{summary.tokens_full:,} (estimated)"))
        rows.append(("tokens saved", f"{summary.saved:.1%} (estimated)"))
    if summary.teacher_tokens_inflight:
        avoided = f"{summary.stopped:,} responses, {summary.tokens_avoided:,} tokens avoided (estimated)"
        rows.append(("tokens stopped in flight", avoided))
        rows.append(("tokens the teacher saw in flight", f"{summary.teacher_tokens_inflight:,}"))
    if summary.padding is not None:
        padded, packed = summary.padding
        rows.append(("padding", f"{packed:.1%} of the tokens (rows padded to the longest: {padded:.1%})"))
    if summary.final_horizon is not None:
        rows.append(("final horizon", f"{summary.final_horizon:,} tokens"))
    for one in summary.teachers:
        overlap = "" if one.overlap is None else f", overlap {one.overlap[0]:.2f} → {one.overlap[1]:.2f}"
        rows.append((f"teacher {one.name}", f"{one.tokens:,} tokens, final horizon {one.final_horizon:,}{overlap}"))
    rows.append(("time", duration(summary.seconds)))
    for label, seconds in summary.phases.items():
        rows.append((f"  {label}", f"{duration(seconds)}  ({seconds / summary.seconds:.0%})"))
    return rows


def readable_answers(counts: tuple[int, int]) -> str:
    """For example: 40 of 48 answers readable."""
    return "{} of {} answers readable".format(*counts)


def unreadable_notes(
    task: str, counts: tuple[int, int] | None, setting: str = "evaluation.extract", model: str = ""
) -> list[str]:
    """A sentence if fewer than half of a task's answers could be read; the ledger's have only one form."""
    if counts is None or task == "ledger" or 2 * counts[0] >= counts[1]:
        return []
    whose = f" of {model}" if model else ""
    return [
        f"note: only {counts[0]} of {counts[1]} answers{whose} to {task} could be read, the others count as wrong: "
        f"{setting} says where a response has its answer ({' | '.join(READERS)} | {REGEX}PATTERN); it may also be cut "
        "off before that"
    ]


def duration(seconds: float) -> str:
    """Seconds as people say them: `9.8 s`, `4 m 12 s`, `3 h 07 m`."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} m {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} m"


def _percent(value: float, error: float | None) -> str:
    return f"{value:.1%}" + (f" ± {error:.1%}" if error is not None else "")


def _phase_shares(record: Record) -> list[tuple[str, float, float]]:
    """(label, seconds, share of the step) of each phase that took time, and of what is left."""
    phases = summarise([record], []).phases
    whole = sum(phases.values())
    return [(label, seconds, seconds / whole) for label, seconds in phases.items()]
