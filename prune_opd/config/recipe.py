"""Recipes: Python files with one function, named like the file, that returns a `TrainConfig` or an `SftConfig`.

What a run has written down is one too: its `config.yaml`, or its directory.
"""

from __future__ import annotations

import ast
import difflib
import os
import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path

from prune_opd.config import RunConfig, SftConfig, TrainConfig
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.paths import recipes_dir
from prune_opd.config.yaml import load_config
from prune_opd.errors import ConfigError, located

WRITTEN = "config.yaml"  # in a run directory: what the run was made of


def list_recipes() -> dict[str, str]:
    """Name → first line of the docstring, for every recipe of the repository. Runs none of them."""
    recipes = {}
    for path in sorted(recipes_dir().glob("[!_]*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        recipes[path.stem] = docstring.partition("\n")[0]
    return recipes


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a recipe: a name in `recipes/`, the path of a .py file, or a run's config.yaml or directory.

    overrides: `dotted.key=value` settings on top (`overrides.apply_overrides`).

    Raises ConfigError if there is no such recipe (with the nearest names), if it cannot be run, if it does not hold a
    function of its own name that returns a TrainConfig or an SftConfig, or if an override is wrong.
    """
    return apply_overrides(_load(name_or_path), list(overrides))


def _load(name_or_path: str) -> RunConfig:
    written = Path(name_or_path)
    if os.sep in name_or_path and (written / WRITTEN).is_file():
        written /= WRITTEN
    if written.suffix in (".yaml", ".yml"):
        return load_config(written)
    path = _recipe_path(name_or_path)
    try:
        function = runpy.run_path(str(path), run_name=f"_recipe_{path.stem}").get(path.stem)
        config = function() if callable(function) else None
    except ConfigError as error:
        raise located(f"recipe {path}", error) from error
    except Exception as error:
        raise ConfigError(_failure(path, error)) from error
    if not callable(function):
        raise ConfigError(f"recipe {path}: it has no function {path.stem}(); name the function like the file")
    if not isinstance(config, TrainConfig | SftConfig):
        raise ConfigError(
            f"recipe {path}: {path.stem}() returned {type(config).__name__}; return a TrainConfig or an SftConfig"
        )
    return config


def _recipe_path(name_or_path: str) -> Path:
    if name_or_path.endswith(".py") or os.sep in name_or_path:
        path = Path(name_or_path)
        if path.suffix != ".py" or not path.is_file():
            if path.stem in list_recipes():
                raise ConfigError(
                    f"recipe {name_or_path}: there is no such file; for the one that comes with the package write its "
                    f"name, {path.stem}"
                )
            raise ConfigError(
                f"recipe {name_or_path}: there is no such .py file; give its path, a name in recipes/, or a run's "
                "config.yaml"
            )
        return path.resolve()
    known = list(list_recipes())
    if name_or_path not in known:
        near = difflib.get_close_matches(name_or_path, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the recipes are {', '.join(known)}"
        raise ConfigError(f"recipe {name_or_path!r} is not known: {hint}")
    return recipes_dir() / f"{name_or_path}.py"


def _failure(path: Path, error: Exception) -> str:
    """One line for an exception that a recipe's own code raised, with the line of the recipe it came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    where = f" line {lines[-1]}" if lines else ""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"recipe {path}{where}: {type(error).__name__}: {' '.join(message.split())}"
