"""Fields of NeMo-Run's SlurmExecutor that a cluster file may have beside our own: read from it, not kept by hand."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from typing import Any

from prune_opd.errors import ConfigError, for_all

# What this project sets itself, and why a cluster file may not.
OURS = {
    "job_name_prefix": "jobs are named after recipe and run",
    "ntasks_per_node": "one task a node watches over its ranks",
    "signal": "signal_before_end sets it",
    "container_env": "it is the names in environment and secrets",
    "setup_lines": "they hold the variables, the secrets and the rule of requeueing",
    "env_vars": "environment has them, quoted",
    "retries": "max_requeues sets it, for runs that have saved",
    **dict.fromkeys(
        ("tunnel", "packager", "launcher", "dependencies", "dependency_type"), "jobs of a submission set it"
    ),
    **dict.fromkeys(("heterogeneous", "het_group_indices", "torchrun_nproc_per_node"), "nodes are all alike here"),
}


def executor_fields(settings: dict[str, Any], own: Sequence[str]) -> dict[str, Any]:
    """Those of `settings` that are fields of the executor, each of its type. own: names that a cluster file has anyway.

    Raises ConfigError for a field that we set ourselves, for a value of the wrong type, and for an option of sbatch
    that is no field (it goes into additional_parameters). Without NeMo-Run there are no fields.
    """
    if not settings:
        return {}
    if refused := [name for name in settings if name in OURS]:
        raise ConfigError(
            "\n".join(f"{name} is not for a cluster file: {OURS[name]}; leave it out" for name in refused)
        )
    try:
        from nemo_run import SlurmExecutor
    except ImportError:
        return {}
    hints = typing.get_type_hints(SlurmExecutor)
    fields = {one.name: hints[one.name] for one in dataclasses.fields(SlurmExecutor) if one.init}

    def read(name: str) -> tuple[str, Any] | None:
        if name in fields:
            return name, _of_type(name, settings[name], fields[name])
        near = difflib.get_close_matches(str(name), [*own, *fields], n=1, cutoff=0.8)
        if name in SlurmExecutor.SBATCH_FLAGS and not near:
            raise ConfigError(
                f"{name} is an option of sbatch and no field of NeMo-Run's executor: write "
                f"additional_parameters: {{{name}: {settings[name]}}}"
            )
        return None  # whoever reads the file names it

    return dict(found for name in settings if (found := for_all(read, [name])[0]) is not None)


def _of_type(name: str, value: Any, hint: Any) -> Any:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError as error:
        wanted = "; ".join(dict.fromkeys(one["msg"][0].lower() + one["msg"][1:] for one in error.errors()))
        raise ConfigError(f"{name} = {value!r} has the wrong type: {wanted}") from error
