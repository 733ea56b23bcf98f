"""What an evaluation takes over from the run that made a model: the form of its prompts, how answers are read.

    RUN, RUN/hf, RUN/checkpoints/step_000100 ── config.yaml, state.json ──▶ OfRun: the model, its run's settings

Stop ids, tokenizer and chat template need no settings: they lie beside the weights, copied from the student that the
run started from, and the rollout engine of the run and that of the evaluation both read them there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_opd.config import DataConfig, TrainConfig
from prune_opd.config.yaml import config_from_dict, load_config
from prune_opd.errors import ConfigError, UserError

PROMPT_SETTINGS = ("chat", "system_prompt", "suffix", "thinking")  # of data.*: what the ledger has none of
EXTRACT = "box_or_last_number"  # of a model that is of no run


@dataclass(frozen=True)
class OfRun:
    """A model and the settings of its run; config: None for a model that is of no run."""

    model_dir: Path
    config: TrainConfig | None

    def task(self, source: str, given: dict[str, Any]) -> DataConfig:
        """A task's prompts: as in the run, but for what is `given`. ConfigError for what does not go together."""
        settings = {name: value for name, value in given.items() if value is not None}
        if self.config is not None and source != "ledger":
            settings = {name: getattr(self.config.data, name) for name in PROMPT_SETTINGS} | settings
        if settings.get("system_prompt") == "":  # given so that the run's is not taken
            settings["system_prompt"] = None
        return DataConfig(source=source, **settings)

    def inherited(self, sources: Sequence[str], given: dict[str, Any], extract: str | None) -> str | None:
        """What an evaluation takes over from the run, to be said; None: nothing."""
        if self.config is None:
            return None
        names = () if set(sources) == {"ledger"} else PROMPT_SETTINGS
        values = {name: getattr(self.config.data, name) for name in names if given.get(name) is None}
        values |= {"extract": self.config.evaluation.extract} if extract is None else {}
        return ", ".join(f"{name} = {value!r}" for name, value in values.items()) or None

    def extract(self, given: str | None) -> str:
        """How answers are read: as `given`, else as in the run, else `EXTRACT`."""
        return given or (self.config.evaluation.extract if self.config else EXTRACT)


def of_run(path: Path) -> OfRun:
    """The model at `path`, and the settings of the run that made it, if it lies in the directory of one.

    path: a Hugging Face directory, a checkpoint, or a run directory: its export `hf`, else its newest checkpoint.

    Raises:
        UserError: a run directory has no model yet.
        ConfigError: the settings of the run cannot be read.
    """
    if (path / "state.json").is_file():
        return OfRun(path, _of_checkpoint(path))
    if (path / "config.json").is_file() or not (path / "config.yaml").is_file():
        whole = path.absolute()
        return OfRun(path, _of_directory(whole.parent) if whole.name == "hf" else None)
    config = _of_directory(path)
    if (path / "hf" / "config.json").is_file():
        return OfRun(path / "hf", config)
    try:
        newest = path / "checkpoints" / (path / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    except OSError:
        newest = path
    if not (newest / "state.json").is_file():
        raise UserError(f"MODEL_DIR = {str(path)!r} is a run without a checkpoint: wait for its first one")
    return OfRun(newest, config)


def _of_checkpoint(path: Path) -> TrainConfig:
    state = path / "state.json"
    try:
        return config_from_dict(TrainConfig, json.loads(state.read_text(encoding="utf-8"))["config"], state)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{state} cannot be read ({error!r}); take another checkpoint") from error


def _of_directory(path: Path) -> TrainConfig | None:
    config = load_config(path / "config.yaml") if (path / "config.yaml").is_file() else None
    return config if isinstance(config, TrainConfig) else None
