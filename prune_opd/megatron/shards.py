"""Reading the shards of a checkpoint, in any layout, without running what is in their index."""

from __future__ import annotations

import pickle
import re
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from prune_opd.errors import UserError

METADATA_FILE = ".metadata"  # torch's index of the shards: a pickle
EXTRA_STATE = "_extra_state"
# What a pickled index may name: classes, and two functions that make values. Anything else is no index but a program.
KNOWN_CLASSES = re.compile(
    r"(torch\.distributed\.checkpoint\.(metadata|filesystem|planner)|megatron\.core\.dist_checkpointing(\.\w+)*) \w+$"
    r"|torch (Size|\w*float\w*|u?int\d+|bool)$|torch\.serialization _get_layout$|pathlib \w+$|_codecs encode$"
    r"|collections OrderedDict$|builtins (set|list|dict|tuple)$"
)


def load_shards(wanted: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """`wanted`, a sharded state dict of any layout, filled from a checkpoint of any other. Collective.

    Transformer Engine's modules ask for an `_extra_state` (FP8 scales) that a checkpoint written without it does not
    have, and do without. Raises `UserError` if anything else is not there.
    """
    refuse_programs(checkpoint / METADATA_FILE)
    state, _, lacking = dist_checkpointing.load(wanted, str(checkpoint), strict=StrictHandling.RETURN_UNEXPECTED)
    lost = sorted(key for key in lacking if EXTRA_STATE not in key)
    if lost:
        raise UserError(
            f"{checkpoint} has no {', '.join(lost[:3])}{' …' if len(lost) > 3 else ''}: it is of another model or"
            " optimizer; resume with the settings it was written with"
        )
    return state


def load_model(model: torch.nn.Module, state: dict[str, Any]) -> None:
    """Give a model what `load_shards` has found for it. Raises `UserError` for a weight that was not."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    lost = [name for name in (*missing, *unexpected) if EXTRA_STATE not in name]
    if lost:
        raise UserError(f"the checkpoint does not fit the model: {', '.join(lost[:3])}; was it of another model?")


class _IndexOnly(pickle.Unpickler):
    """Reads the index of the shards and no other pickle."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # how older Pythons (3.11.2 is one) write an enum's member
            return _enum_member
        refusal = pickle.UnpicklingError(f"it names {module}.{name}")
        if not KNOWN_CLASSES.match(f"{module} {name}"):  # a dotted name would reach what a module has imported
            raise refusal
        found = super().find_class(module, name)
        if not isinstance(found, type | torch.dtype) and name not in ("_get_layout", "encode"):
            raise refusal
        return found


def _enum_member(owner: Any, name: str) -> Any:
    """`getattr` for the members of enums and for nothing else."""
    if not (isinstance(owner, type) and issubclass(owner, Enum) and name in owner.__members__):
        raise pickle.UnpicklingError(f"it takes {name} of {owner!r}")
    return owner[name]


def refuse_programs(index: Path) -> None:
    """torch reads the index of a checkpoint with `pickle`, which runs what it is told to: look at it first.

    Raises `UserError` if it names anything but the classes of an index.
    """
    try:
        with index.open("rb") as file:
            _IndexOnly(file).load()
    except OSError as error:
        raise UserError(f"{index} cannot be read ({error.strerror}): the checkpoint is incomplete") from error
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, ValueError) as error:
        raise UserError(f"{index} is not the index of a checkpoint ({error}): it is not read") from error
