"""The shards of a checkpoint, in megatron's distributed format: written in the background, read in any layout."""

from __future__ import annotations

import multiprocessing
import pickle
import re
import signal
import sys
from enum import Enum
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import CheckpointingException
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from prune_opd.errors import UserError
from prune_opd.process import end_with_parent

METADATA_FILE = ".metadata"  # torch's index of the shards: a pickle
EXTRA_STATE = "_extra_state"
# What a pickled index may name: classes, and two functions that make values. Anything else is no index but a program.
KNOWN_CLASSES = re.compile(
    r"(torch\.distributed\.checkpoint\.(metadata|filesystem|planner)|megatron\.core\.dist_checkpointing(\.\w+)*) \w+$"
    r"|torch (Size|\w*float\w*|u?int\d+|bool)$|torch\.serialization _get_layout$|pathlib \w+$|_codecs encode$"
    r"|collections OrderedDict$|builtins (set|list|dict|tuple)$"
)


class WriteError(Exception):
    """Shards could not be written; the message says why."""


class ShardWriter:
    """Writes shards from a child process of each rank, while training goes on. One save at a time; all collective."""

    def __init__(self, replicas: Any) -> None:
        """replicas: the group of this rank's data-parallel replicas."""
        self._queue, self._replicas = AsyncCallsQueue(persistent=False), replicas

    def begin(self, state: dict[str, Any], folder: Path) -> None:
        """Begin to write a sharded state dict as it is now. What rank 0 writes by itself may raise `OSError`."""
        _results_end_with_us()
        # Of what several replicas hold each writes a part, where otherwise the first one would write it all.
        strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), self._replicas)
        request = dist_checkpointing.save(state, str(folder), strategy, async_sharded_save=True)
        self._queue.schedule_async_request(request)

    def is_done(self, blocking: bool) -> bool:
        """Whether every rank has written its shards; wait for it with `blocking`. Raises `WriteError` on every rank."""
        try:
            return bool(self._queue.maybe_finalize_async_calls(blocking=blocking))
        except (OSError, CheckpointException, CheckpointingException) as error:
            raise WriteError(_reasons(error)) from error


def _results_end_with_us() -> None:
    """megatron's process that hands on what the writers did would outlive a rank that was killed.

    It would also import torch, with our main program and with what it hands on: four CPU seconds, 250 MB.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        with mock.patch.multiple(sys.modules["__main__"], create=True, __spec__=None, __file__=None):
            manager.start(initializer=end_with_parent, initargs=(signal.SIGKILL,))
        filesystem_async._results_queue = _Sealed(manager.Queue())


class _Sealed:
    """A queue through a process that cannot look into what it hands on."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, result: Any) -> None:
        self._queue.put(pickle.dumps(result))

    def get_nowait(self) -> Any:
        return pickle.loads(self._queue.get_nowait())


def _reasons(error: BaseException) -> str:
    """The writers' own words out of torch's bundle of exceptions by rank (which only rank 0 has)."""
    failures = getattr(error, "failures", None) or {}
    said = dict.fromkeys(str(failure[0]).partition("\n")[0] for failure in failures.values())
    return "; ".join(said) or ("rank 0 has the reason" if isinstance(error, CheckpointException) else str(error))


def sharded_model(model: Any, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """A model's sharded state dict, without what Transformer Engine would add to it as a pickle.

    Its `_extra_state` holds the history of FP8 scales, which only delayed scaling has. It is read by `pickle`, which
    runs what it is told to.
    """
    state, config = model.sharded_state_dict(metadata=metadata), model.config
    if config.fp8 and config.fp8_recipe == "delayed":
        return dict(state)
    return {name: tensor for name, tensor in state.items() if EXTRA_STATE not in name}


def load_shards(wanted: dict[str, Any], checkpoint: Path, replicas: Any = None) -> dict[str, Any]:
    """`wanted`, a sharded state dict of any layout, filled from a checkpoint of any other. Collective.

    replicas: the group of this rank's data-parallel replicas. What several of them want, one reads from the disk and
    broadcasts, tensor by tensor, where otherwise each would read it.
    Transformer Engine's modules ask for an `_extra_state` (FP8 scales) that a checkpoint written without it does not
    have, and do without. Raises `UserError` if anything else is not there.
    """
    refuse_programs(checkpoint / METADATA_FILE)
    strategy = get_default_load_sharded_strategy(str(checkpoint))
    if replicas is not None:
        strategy = FullyParallelLoadStrategyWrapper(strategy, replicas)
    strict = StrictHandling.RETURN_UNEXPECTED
    state, _, lacking = dist_checkpointing.load(wanted, str(checkpoint), strategy, strict=strict)
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
