"""`prune-opd train`, `check` and `sft`: load a recipe, check it, and go on with it on ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from prune_opd.check.machine import compiler_problems
from prune_opd.check.notes import check_notes
from prune_opd.check.run import check_everything, check_sft, check_structure
from prune_opd.cli.look import Overrides, Recipe
from prune_opd.cli.start import is_rank, on_ranks, rank_count
from prune_opd.cli.worker import is_main_rank
from prune_opd.config import RunConfig, SftConfig, TrainConfig
from prune_opd.config.changes import changes
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe
from prune_opd.config.yaml import load_config
from prune_opd.errors import REQUEUE_EXIT_CODE, ConfigError, UserError
from prune_opd.model_spec import ModelSpec, model_config
from prune_opd.plan.compiling import compiling
from prune_opd.process import has_gpu

C = TypeVar("C", bound=RunConfig)

Nproc = Annotated[int | None, typer.Option(min=1, help="Ranks on this node.", show_default="parallel.nproc")]
RunDir = Annotated[Path | None, typer.Option(help="The run directory.", show_default="runs/NAME")]


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    nproc: Nproc = None,
    resume: Annotated[str, typer.Option(metavar="auto|never|PATH", help="Where to go on from.")] = "auto",
    run_dir: RunDir = None,
    allow_config_change: Annotated[
        bool, typer.Option("--allow-config-change", help="Go on with settings that make another run of it.")
    ] = False,
) -> int:
    """Train a recipe: distil its teacher into its student. Goes on where an earlier run in RUN_DIR stopped."""
    config = load(recipe, overrides, TrainConfig, "train")
    return train_config(config, run_dir, nproc, resume, allow_config_change)


def check(
    recipe: Recipe,
    overrides: Overrides = None,
    nproc: Nproc = None,
    run_dir: RunDir = None,
    structure: Annotated[
        bool, typer.Option("--structure", help="Only what needs neither weights nor GPUs: layout, lengths, sizes.")
    ] = False,
) -> int:
    """Every check of a recipe that needs no GPU: prints a line per problem and exits with 1, or prints ok.

    Before that come notes, which refuse nothing: what follows from settings that are seldom meant.
    """
    config = apply_overrides(load_recipe(recipe), overrides or [])
    if not isinstance(config, TrainConfig):
        problems = check_sft(config, rank_count(nproc, config))
    else:
        ranks = rank_count(nproc, config, config.planning.nodes)
        problems = (
            check_structure(config, ranks)
            if structure
            else check_everything(config, ranks, run_dir or _default_run_dir(config), "auto")
        )
    notes = check_notes(config) if isinstance(config, TrainConfig) and not structure else []
    print("\n".join([*notes, *(problems or ["ok"])]))
    return 1 if problems else 0


def sft(
    recipe: Recipe,
    overrides: Overrides = None,
    nproc: Nproc = None,
    if_missing: Annotated[
        bool, typer.Option("--if-missing", help="Do nothing if the output was made with these settings.")
    ] = False,
) -> int:
    """Supervised training of a tiny model. With overrides, give output=DIR too: the cache holds what recipes say."""
    recipe_config = load(recipe, None, SftConfig, "sft")
    config = apply_overrides(recipe_config, overrides or [])
    if config != recipe_config and config.output == recipe_config.output:
        raise ConfigError(f"output = {config.output!r} belongs to the recipe without overrides: add output=DIR")
    if if_missing and _is_made(config):
        print(f"{config.output} is there already")
        return 0
    ranks = rank_count(nproc, config)
    refuse(check_sft(config, ranks))
    return on_ranks(ranks, "sft", config=config)


# ---------------------------------------------------------------------------------------------------- helpers


def train_config(
    config: TrainConfig, run_dir: Path | None, nproc: int | None, resume: str, allow_config_change: bool = False
) -> int:
    """Check a run, say what there is to say, and train on ranks. Returns the exit code; UserError if it is refused."""
    ranks = rank_count(nproc, config)
    run_dir = (run_dir or _default_run_dir(config)).absolute()
    # Rank 0 fills the run directory while the others may still be checking: only rank 0 looks at it.
    looked_at = run_dir if is_main_rank() else None
    refuse(check_everything(config, ranks, looked_at, resume, allow_config_change))
    config = compiled_if_it_pays(config, ranks, looked_at is not None, _resumed(run_dir, resume))
    for line in changes(config, looked_at, resume) if looked_at else []:
        print(f"changed since the run began: {line}", flush=True)
    for line in check_notes(config) if looked_at else []:
        print(line, flush=True)
    if resume == "auto" and _is_finished(config, run_dir):
        print(f"{run_dir} is finished; to draw its report again: prune-opd report {run_dir}")
        return 0
    if not is_rank():
        print(f"{config.name}: {ranks} ranks, run directory {run_dir}", flush=True)
    allowed = ["--allow-config-change"] if allow_config_change else []
    code = on_ranks(ranks, "train", "--run-dir", str(run_dir), "--resume", resume, *allowed, config=config)
    if code == REQUEUE_EXIT_CODE and not is_rank():
        print(f"saved, not finished: the same command goes on from there (exit code {code})", flush=True)
    return code


def compiled_if_it_pays(
    config: TrainConfig, ranks: int, speaks: bool, checkpoint: tuple[str, dict[str, Any]] | None = None
) -> TrainConfig:
    """The config with `rollout.enforce_eager` decided where a CPU run leaves it open (plan/compiling.py).

    checkpoint: name and state of the one that the run goes on from. It has the decision of the start that wrote it,
    which is kept: another number of ranks, planned length or machine may give another one. Raises `UserError` where
    the model was compiled and cannot be here.
    """
    if config.rollout.enforce_eager is not None or has_gpu():
        return config
    compiled = replace(config.rollout, enforce_eager=False)
    if checkpoint is not None:
        name, state = checkpoint
        eager = state["config"]["rollout"].get("enforce_eager")  # None: it was left open, and did not pay
        if eager is False and (lacking := compiler_problems(compiled, gpu=False)):
            reason = lacking[0].removesuffix(", or set rollout.enforce_eager=null")
            raise UserError(
                f"vLLM compiled the model in the run that {name} is of. {reason}, or go on without compiling: "
                "rollout.enforce_eager=true"
            )
        if speaks:
            verb, otherwise = "compiles" if eager is False else "does not compile", "true or false decides otherwise"
            print(f"vLLM {verb} the model, as before {name} (rollout.enforce_eager={otherwise})", flush=True)
        return replace(config, rollout=replace(config.rollout, enforce_eager=eager))
    layers = ModelSpec.of(model_config("student", config.student), config.student).layers
    found = compiling(config, layers, ranks)
    lacking = compiler_problems(compiled, gpu=False) if found.pays else []
    if speaks:
        print(f"{found}; but {lacking[0]}" if lacking else found, flush=True)
    return replace(config, rollout=compiled) if found.pays and not lacking else config


def load(recipe: str, overrides: list[str] | None, kind: type[C], command: str) -> C:
    """The config of a recipe with its overrides. Raises ConfigError, also if the recipe is not of this `kind`."""
    config = load_recipe(recipe)
    if not isinstance(config, kind):
        other = "train" if command == "sft" else "sft"
        raise ConfigError(f"recipe {recipe!r} is not for `prune-opd {command}`: run `prune-opd {other} {recipe}`")
    return apply_overrides(config, overrides or [])


def refuse(problems: list[str]) -> None:
    """Raise a UserError with a line per problem, if there are any."""
    if problems:
        raise UserError("\n".join(problems))


def _default_run_dir(config: TrainConfig) -> Path:
    return Path("runs") / config.name


def _resumed(run_dir: Path, resume: str) -> tuple[str, dict[str, Any]] | None:
    """Name and state of the checkpoint that a start goes on from; None if there is none that can be read."""
    if resume == "never":
        return None
    checkpoint, checkpoints = Path(resume), run_dir / "checkpoints"
    try:
        if resume == "auto":
            checkpoint = checkpoints / (checkpoints / "latest").read_text(encoding="utf-8").strip()
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        state["config"]["rollout"], state["step"]  # what a checkpoint of ours has
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return checkpoint.name, state


def _is_finished(config: TrainConfig, run_dir: Path) -> bool:
    """Whether the last step's checkpoint and, if wanted, the export of the student are there."""
    resumed = _resumed(run_dir, "auto")
    exported = (run_dir / "hf" / "config.json").is_file() or not config.checkpoint.export_hf
    return bool(resumed is not None and resumed[1]["step"] >= config.steps and exported)


def _is_made(config: SftConfig) -> bool:
    output = Path(config.output)
    try:
        return (output / "model.safetensors").is_file() and load_config(output / "sft_config.yaml") == config
    except ConfigError:  # made by another version: make it again
        return False
