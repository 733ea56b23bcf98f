"""Where a run's numbers go: metrics.jsonl and samples.jsonl first, then console, wandb, TensorBoard; last the report.

The training loop speaks to a `Tracker` on rank 0 and to a `NullTracker` on the others, and cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_opd.config import TrainConfig
from prune_opd.track import samples, wandb_log
from prune_opd.track.console import RunConsole
from prune_opd.track.health import warnings
from prune_opd.track.metrics import FILE_NAME, MetricsLog, Record, read_doubts, read_metrics
from prune_opd.track.provenance import Provenance
from prune_opd.track.tensorboard_log import TensorBoardLog

LOG_NAME = "run.log"  # what the console shows, as plain lines with their times

if TYPE_CHECKING:
    from prune_opd.loss.stats import BatchStats
    from prune_opd.rollout.batch import Rollouts


class NullTracker:
    """The tracker of the ranks that track nothing, and the interface of the one that does. A context manager."""

    def step(self, record: Record) -> None:
        """Takes the record of a finished optimizer step (keys: `metrics.meanings`)."""

    def samples(self, step: int, horizon: int, rollouts: Rollouts, stats: BatchStats) -> None:
        """Takes the responses of a finished step that `stats` has watched, after the step's record."""

    def evaluation(self, record: Record) -> None:
        """Takes an evaluation line: step, eval_<task>, eval_<task>_stderr, eval_response_length, time_eval."""

    def note(self, text: str) -> None:
        """Takes a sentence for whoever watches the run."""

    def phase(self, name: str) -> None:
        """Takes the phase that the ranks are in now."""

    def started(self, lines: Sequence[str]) -> None:
        """Takes what was said before there was a tracker, for the log."""

    def close(self, exit_code: int = 0) -> None:
        """Ends the tracking. Safe to call twice. exit_code: not 0 after a failure."""

    def __enter__(self) -> NullTracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.close(exit_code=0 if kind is None else 1)


class Tracker(NullTracker):
    """Rank 0's tracker.

    Args:
        run_dir: the run directory; gets metrics.jsonl, samples.jsonl, run.log, provenance.json, wandb/ and
            tensorboard/, and at the end report.html, report.png and report/.
        config: name, steps and track settings are read.
        config_dict: the resolved configuration, for wandb.
        resume_step: steps that the checkpoint had finished; what the files have of later ones is dropped. 0 starts
            anew.
        tokenizer: the student's, for the texts of the samples.
        origin: hosts of all ranks, and the names of this one's GPUs.

    Raises:
        UserError: the metrics of a run to resume cannot be read.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrainConfig,
        config_dict: dict[str, Any],
        resume_step: int,
        tokenizer: Any,
        origin: tuple[Sequence[str], Sequence[str]] = ((), ()),
    ) -> None:
        self._run_dir, self._report, self._tokenizer = run_dir, config.track.report, tokenizer
        metrics, responses = run_dir / FILE_NAME, run_dir / samples.FILE_NAME
        found = read_doubts(metrics) if resume_step and metrics.is_file() else []
        found += samples.sample_doubts(responses) if resume_step else []
        self._log = MetricsLog(metrics, keep_through=resume_step or None)
        self._samples = MetricsLog(responses, keep_through=resume_step or None)
        self._steps, _ = read_metrics(self._log.path)
        self._doubts: set[str] = set()
        self._warned: set[str] = set()
        self._mismatch_limit = config.mismatch_limit or config.usual_mismatch
        self._last_step, self._provenance = config.steps, Provenance(run_dir, resume_step, *origin)
        log = run_dir / LOG_NAME
        self._console = RunConsole(config.name, config.steps, resume_step + 1, history=self._steps, log=log)
        shown = config.name if run_dir.name == config.name else f"{config.name} {run_dir.name}"  # a sweep's differ
        self._wandb = wandb_log.start(
            run_dir, config_dict, config.track, shown, resume=resume_step > 0, warn=self._console.note
        )
        self._say_doubts(found)
        events = run_dir / "tensorboard" if config.track.tensorboard else None
        self._tensorboard = TensorBoardLog(events, resume_step, self._console.note)
        self._open = True

    def step(self, record: Record) -> None:
        self._steps.append(record)
        found = warnings(self._steps, self._mismatch_limit)
        if found:
            record["warning"] = "; ".join(found.values())
        self._log.write(record)
        self._console.step(record)
        for kind in found.keys() - self._warned:  # once: the numbers in it change every step
            self._console.note(f"warning: {found[kind]}")
        self._warned |= found.keys()
        self._wandb.log(record)
        self._tensorboard.log(record)

    def samples(self, step: int, horizon: int, rollouts: Rollouts, stats: BatchStats) -> None:
        records = samples.sample_records(step, horizon, rollouts, stats, self._tokenizer)
        for record in records:
            self._samples.write(record)
        self._wandb.log_samples(records)

    def evaluation(self, record: Record) -> None:
        self._log.write(record)
        self._console.evaluation(record)
        self._wandb.log(record)
        self._tensorboard.log(record)

    def note(self, text: str) -> None:
        self._console.note(text)

    def phase(self, name: str) -> None:
        self._console.phase(name)

    def started(self, lines: Sequence[str]) -> None:
        self._console.keep(lines)

    def close(self, exit_code: int = 0) -> None:
        """Prints the summary and writes the report. A report that fails is a note, never the run's failure."""
        if not self._open:
            return
        self._open = False
        self._log.close()
        self._samples.close()
        self._wandb.finish(exit_code)
        self._tensorboard.close()
        steps, evaluations = read_metrics(self._log.path)
        self._say_doubts(read_doubts(self._log.path) + samples.sample_doubts(self._samples.path))
        done = steps[-1]["step"] if steps else 0
        self._provenance.end("failed" if exit_code else "finished" if done >= self._last_step else "stopped", done)
        try:
            self._summarise(steps, evaluations, failed=exit_code != 0)
        finally:
            self._console.end_log()

    def _say_doubts(self, found: Sequence[str]) -> None:
        """What is wrong with the files, each once: at a resume, and at the end, since another process may write too."""
        for doubt in found:
            if doubt not in self._doubts:
                self._console.note(f"note: {doubt}")
                self._doubts.add(doubt)

    def _summarise(self, steps: list[Record], evaluations: list[Record], failed: bool) -> None:
        if not steps and not evaluations:
            self._console.close()
            return
        self._console.summary(steps, evaluations, failed)
        if not self._report:
            return
        try:
            from prune_opd.track.report import write_report  # matplotlib: only now, and only here

            out = self._run_dir / "report.html"
            write_report([self._run_dir], out)
            self._console.note(f"report: {out}")
        except Exception as error:
            self._console.note(f"the report could not be written ({type(error).__name__}: {error})")
