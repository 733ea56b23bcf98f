"""Where a run's numbers go: metrics.jsonl first, then the console and wandb, and at the end the report.

The training loop speaks to a `Tracker` on rank 0 and to a `NullTracker` on the others, and cannot tell them apart.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from prune_opd.config import TrainConfig
from prune_opd.track import wandb_log
from prune_opd.track.console import RunConsole
from prune_opd.track.metrics import FILE_NAME, MetricsLog, Record, read_metrics


class NullTracker:
    """The tracker of the ranks that track nothing, and the interface of the one that does. A context manager."""

    def step(self, record: Record) -> None:
        """Takes the record of a finished optimizer step (keys: `metrics.METRICS`)."""

    def evaluation(self, record: Record) -> None:
        """Takes an evaluation line: step, eval_<task>, eval_<task>_stderr, eval_response_length, time_eval."""

    def note(self, text: str) -> None:
        """Takes a sentence for whoever watches the run."""

    def close(self) -> None:
        """Ends the tracking. Safe to call twice."""

    def __enter__(self) -> NullTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Tracker(NullTracker):
    """Rank 0's tracker.

    Args:
        run_dir: the run directory; gets metrics.jsonl, wandb/, and at the end report.html and report.png.
        config: name, steps and track settings are read.
        config_dict: the resolved configuration, for wandb.
        resume_step: steps that the checkpoint had finished; what metrics.jsonl has of later ones is dropped.
            0 starts anew.

    Raises:
        UserError: the metrics of a run to resume cannot be read.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, config_dict: dict[str, Any], resume_step: int) -> None:
        self._run_dir, self._report = run_dir, config.track.report
        self._log = MetricsLog(run_dir / FILE_NAME, keep_through=resume_step or None)
        history, _ = read_metrics(self._log.path)
        self._console = RunConsole(config.name, config.steps, resume_step + 1, history=history)
        self._wandb = wandb_log.start(
            run_dir, config_dict, config.track, config.name, resume=resume_step > 0, warn=self._console.note
        )
        self._open = True

    def step(self, record: Record) -> None:
        self._log.write(record)
        self._console.step(record)
        self._wandb.log(record)

    def evaluation(self, record: Record) -> None:
        self._log.write(record)
        self._console.evaluation(record)
        self._wandb.log(record)

    def note(self, text: str) -> None:
        self._console.note(text)

    def close(self) -> None:
        """Prints the summary and writes the report. A report that fails is a note, never the run's failure."""
        self._close(exit_code=0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(exit_code=0 if kind is None else 1)

    def _close(self, exit_code: int) -> None:
        if not self._open:
            return
        self._open = False
        self._log.close()
        self._wandb.finish(exit_code)
        steps, evaluations = read_metrics(self._log.path)
        if not steps and not evaluations:
            self._console.close()
            return
        self._console.summary(steps, evaluations)
        if not self._report:
            return
        try:
            from prune_opd.track.report import write_report  # matplotlib: only now, and only here

            out = self._run_dir / "report.html"
            write_report([self._run_dir], out)
            self._console.note(f"report: {out}")
        except Exception as error:
            self._console.note(f"the report could not be written ({type(error).__name__}: {error})")
