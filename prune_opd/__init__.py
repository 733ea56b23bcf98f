"""Prune-OPD: on-policy distillation that prunes unreliable rollouts.

    from prune_opd import load_recipe, train

    train(load_recipe("tiny_compatible", ["steps=2"]), "runs/mine")

Importing this loads nothing: `prune_opd/cli/api.py` comes with the first use, torch and vLLM only in the ranks.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_recipe", "train"]

# By name, so that whoever imports a part of this package does not import all of it.
_API = {"load_recipe": "prune_opd.config.recipe", "train": "prune_opd.cli.api"}


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'prune_opd' has no attribute {name!r}")
    return getattr(import_module(_API[name]), name)
