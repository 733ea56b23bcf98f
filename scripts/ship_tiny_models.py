"""Put the tiny models of the per-user cache into the package, in bf16: prune_opd/testbed/models/NAME.

    make tiny-models
    .venv/bin/python scripts/ship_tiny_models.py          then look at the change, run the tests, and commit

To be repeated when a recipe that makes one of them has changed: tests/config/test_tiny_models.py says so. `index.json`
beside them keeps the digest of the recipe, the day, and the kind of processor: on another kind the sums are rounded
otherwise, and the weights come out a little different.
"""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import load_file

from prune_opd.config import SftConfig
from prune_opd.config.paths import shipped_models_dir
from prune_opd.config.recipe import load_recipe
from prune_opd.config.yaml import load_config, save_config
from prune_opd.weights.files import HfDirectoryWriter

RECIPES = ("tiny_base", "tiny_teacher", "tiny_student", "tiny_drift_teacher", "tiny_drift_student")
ONE_FILE = 10**9  # bytes


def ship(recipe: SftConfig, out: Path) -> dict[str, str]:
    """Write the model that `recipe` made to `out`, and return its line of the index."""
    source = Path(recipe.output)
    if not (source / "sft_config.yaml").is_file() or load_config(source / "sft_config.yaml") != recipe:
        raise SystemExit(f"error: {source} is missing, or was made with other settings: run `make tiny-models`")
    writer = HfDirectoryWriter(out, source, ONE_FILE)
    for name, tensor in load_file(source / "model.safetensors").items():
        writer.add(name, tensor.to(torch.bfloat16))
    writer.finish()
    # As in the cache, <digest>/<name>, which is all that the digest takes of a path: not where this machine's cache is.
    here = replace(recipe, output=_end(recipe.output), init=recipe.init and _end(recipe.init))
    save_config(here, out / "sft_config.yaml")
    return {
        "recipe": recipe.name,
        "digest": source.parent.name,
        "trained_on": date.fromtimestamp((source / "model.safetensors").stat().st_mtime).isoformat(),
        "processor": _processor(),
    }


def _end(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    models = shipped_models_dir()
    new = models.with_name("models.new")
    shutil.rmtree(new, ignore_errors=True)
    index = {}
    for name in RECIPES:
        recipe = load_recipe(name)
        assert isinstance(recipe, SftConfig)
        short = Path(recipe.output).name
        index[short] = ship(recipe, new / short)
    (new / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(models, ignore_errors=True)  # not before all of them are there
    new.rename(models)
    print(f"{models}: {sum(path.stat().st_size for path in models.rglob('*') if path.is_file()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
