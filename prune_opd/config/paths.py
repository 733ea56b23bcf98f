"""Where things lie outside a run: the per-user cache with the tiny models, and the recipes of the repository."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import platformdirs

from prune_opd.config import SftConfig, to_dict
from prune_opd.errors import ConfigError

SFT_LAYOUT = ("nproc", "tensor", "microbatch_tokens", "timeout_minutes")
# Settings that came after the first models. Where they are off they are left out, and the models keep their digests.
LATER_CORPUS = ("register", "wrong_entries", "wrong", "ramble", "chant", "given", "given_wrong", "hinted", "sorting")


def cache_dir() -> Path:
    """The per-user cache of this project; the environment variable PRUNE_OPD_CACHE moves it. Not created here."""
    moved = os.environ.get("PRUNE_OPD_CACHE")
    return Path(moved).expanduser().absolute() if moved else Path(platformdirs.user_cache_dir("prune-opd"))


def recipes_dir() -> Path:
    """The folder of the recipes: `recipes/` of the checkout, inside the package in an installed copy."""
    return Path(__file__).resolve().parent.parent / "recipes"


def models_dir() -> Path:
    """The folder of published models, as OWNER/NAME: the environment variable PRUNE_OPD_MODELS, else `models`."""
    return Path(os.environ.get("PRUNE_OPD_MODELS", "models")).expanduser()


def data_dir() -> Path:
    """The folder of prompt files: the environment variable PRUNE_OPD_DATA, else `data`."""
    return Path(os.environ.get("PRUNE_OPD_DATA", "data")).expanduser()


def tiny_model_dir(name: str, config_digest: str) -> Path:
    """The cached Hugging Face directory of a tiny model, for example `tiny_model_dir("base", digest)`."""
    return cache_dir() / "tiny" / config_digest / name


def real_pair_dir() -> Path:
    """The cached folder of the real pretrained pair, teacher/, student/ and data/: `make real-pair` fills it."""
    return cache_dir() / "real-pair"


def shipped_models_dir() -> Path:
    """The folder of the tiny models that come with the package, NAME/ each, and of their `index.json`."""
    return Path(__file__).resolve().parent.parent / "testbed" / "models"


def tiny_model(recipe: SftConfig) -> str:
    """The directory of the tiny model that `recipe` makes: the one that comes with the package.

    It is the cache's, `recipe.output`, if the environment variable PRUNE_OPD_TINY_MODELS is `trained`, and if the
    recipe is no longer the one that made the package's. Raises ConfigError for another value of the variable.
    """
    source = os.environ.get("PRUNE_OPD_TINY_MODELS", "shipped")
    if source not in ("shipped", "trained"):
        raise ConfigError(f"PRUNE_OPD_TINY_MODELS = {source!r} is not known: choose shipped or trained")
    digest, name = Path(recipe.output).parts[-2:]
    index = shipped_index()
    if source == "trained" or name not in index or index[name]["digest"] != digest:
        return recipe.output
    return str(shipped_models_dir() / name)


def shipped_index() -> dict[str, dict[str, str]]:
    """What comes with the package, by name."""
    index: dict[str, dict[str, str]] = json.loads((shipped_models_dir() / "index.json").read_text(encoding="utf-8"))
    return index


def config_digest(config: SftConfig) -> str:
    """Twelve hex digits that change with everything that shapes the trained model; the cache's path does not count.

    - `output` is left out, so that its path can contain the digest.
    - Of `init` the last two parts count. For a model of the cache they are `<digest>/<name>`, so the digest covers the
      whole lineage: a changed ancestor rebuilds its descendants.
    - Of a model that comes with the package the digest of its recipe counts, and that it is the package's.
    - Of the layout only `SFT_LAYOUT` counts, so that a new kind of parallelism leaves the models as they are.
    - Of a corpus the settings that came later count only where they are on.
    """
    settings = to_dict(config)
    del settings["output"]
    for stage in settings["stages"]:
        stage["corpus"] = {name: value for name, value in stage["corpus"].items() if value or name not in LATER_CORPUS}
    settings["parallel"] = {name: settings["parallel"][name] for name in SFT_LAYOUT}
    if config.init is not None:
        init = Path(config.init)
        settings["init"] = init.parts[-2:]
        if init.parent == shipped_models_dir():
            settings["init"] = ("shipped", shipped_index()[init.name]["digest"], init.name)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
