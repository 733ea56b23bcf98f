"""`prune-opd check` of every recipe in the image's environment.

As on this machine: --structure, which needs no weights. As on a machine with a GPU (`has_gpu` says so): number formats,
against the Transformer Engine and the CUDA that are really here; and whatever a run looks at before it takes its GPUs,
for the recipes whose models are here, imports of Transformer Engine and apex's kernel included.
"""

from __future__ import annotations

import functools
import os
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

from prune_opd.check import gpu
from prune_opd.check import run as check
from prune_opd.cli.runs import check as command
from prune_opd.config import RunConfig, TrainConfig
from prune_opd.config.recipe import list_recipes, load_recipe
from prune_opd.model_spec import model_config
from scripts.h100.imports import compiled

PATIENCE = 1500  # seconds of an import, on a machine that others load
# What cannot be had here: Transformer Engine's import, where its compiled half is not.
NOT_HERE = () if compiled() else ("Transformer Engine is installed and cannot be imported",)


def structure(name: str) -> str | None:
    """What the command says; None if it finds nothing."""
    with redirect_stdout(StringIO()) as said:
        code = command(name, structure=True)
    return said.getvalue().strip() if code else None


@functools.cache
def imports() -> list[str]:
    """As the check does it, once."""
    return gpu.import_problems()


def as_on_a_gpu(config: TrainConfig) -> list[str]:
    world = config.planning.nodes * config.parallel.nproc
    pairs = [
        (own, [check._Model(role, Path(where), model_config(role, where)) for role, where in own.model_dirs.items()])
        for own in config.by_teacher.values()
    ]
    with (
        mock.patch.object(check, "has_gpu", lambda: True),
        mock.patch.object(check, "import_problems", imports),
        mock.patch.object(gpu, "IMPORT_SECONDS", PATIENCE),
    ):
        found = [
            line for own, models in pairs for line in check._sizes(own, world, models) + check._precision(own, models)
        ]
        if all(Path(model.path, "config.json").is_file() for _, models in pairs for model in models):
            with tempfile.TemporaryDirectory() as folder:
                found += check.check_everything(config, config.parallel.nproc, Path(folder) / "run")
    return [line for line in found if not line.startswith(NOT_HERE)]


def made_here(config: RunConfig) -> list[Path]:
    """The tiny models that a recipe begins with: directories of this machine, not names of published models."""
    if isinstance(config, TrainConfig):
        found = [where for own in config.by_teacher.values() for where in own.model_dirs.values()]
    else:
        found = [config.init or ""]
    return [path for path in map(Path, found) if path.is_absolute()]


def main() -> int:
    os.environ.setdefault("COLUMNS", "160")
    bad = 0
    for start in NOT_HERE:
        print(f"left out: lines that begin with {start!r}, which cannot be had here")
    for name in list_recipes():
        config = load_recipe(name)
        found = [line for line in (structure(name),) if line]
        here = ""
        if not all(map(Path.is_dir, made_here(config))):
            print(f"{name}: it begins with a model that `prune-opd sft` makes, and that is not here")
            continue
        if isinstance(config, TrainConfig):
            found += as_on_a_gpu(config)
            here = ", everything" if Path(config.student, "config.json").is_file() else ""
        print(f"{name}: {'; '.join(found) or f'no problem (structure, number formats{here})'}")
        bad += bool(found)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
