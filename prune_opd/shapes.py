"""The config.json of a recipe's model: its own where there is one, else the published one (recipes/shapes.json)."""

from __future__ import annotations

import functools
import json
import typing
from pathlib import Path
from typing import Any

from prune_opd.errors import ConfigError
from prune_opd.paths import recipes_dir


def model_config(role: str, directory: str) -> dict[str, Any]:
    """The settings of a model, whether or not its weights are there. role: the setting that names it.

    A published model is known by the last two parts of its path (`…/Qwen/Qwen3-8B`). Raises `ConfigError` if the
    directory has no readable config.json and its name is not a published model's.
    """
    path = Path(directory) / "config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise ConfigError(f"{role} = {directory!r}: its config.json cannot be read ({error})") from error
        if not isinstance(config, dict):
            raise ConfigError(f"{role} = {directory!r}: its config.json is not that of a causal language model")
        return config
    name = "/".join(Path(directory).parts[-2:])
    if name not in (known := published()):
        raise ConfigError(
            f"{role} = {directory!r}: there is no config.json in it, and {name} is none of the published models that "
            f"are known without one ({', '.join(known)}): give a Hugging Face model directory"
        )
    return dict(known[name])


@functools.cache
def published() -> dict[str, dict[str, Any]]:
    """config.json by `owner/name`, as far as it says something of the shape."""
    return typing.cast(
        dict[str, dict[str, Any]],
        json.loads((recipes_dir() / "shapes.json").read_text(encoding="utf-8"))["models"],
    )
