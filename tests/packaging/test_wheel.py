"""The wheel: what is in it, and that an installed copy works from another folder, without the checkout.

It is built from a copy of the files that docker/Dockerfile copies, without a network, and installed beside the
environment's packages. A `sitecustomize` takes the environment's own (editable) prune_opd out of the way, and writes
down at exit where each process got prune_opd from.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from prune_opd.config.recipe import list_recipes

REPOSITORY = Path(__file__).resolve().parents[2]
LARGE = "qwen3_8b_from_32b_32xh100_fp8"
WITHOUT_THE_CHECKOUT = """
import atexit, os, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
sys.path[:] = [place for place in sys.path if place != os.environ["CHECKOUT"]]
def note():
    package = sys.modules.get("prune_opd")
    if package:
        open(os.environ["PLACES"], "a").write(package.__file__ + "\\n")
atexit.register(note)
"""
USER_RECIPE = """
from dataclasses import replace
from prune_opd.recipes._paper import paper_base

def mine():
    models = "Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-4B"
    base = paper_base("mine", *models, init_len=2048, response_length=7500, mean_horizon=6144)
    return replace(base, steps=3)
"""


@dataclass
class Installed:
    """The package in `site`, and an empty folder to run it in."""

    site: Path
    work: Path

    def run(self, *args: str, code: int = 0) -> str:
        """stdout of the command, which ends with `code`, and whose processes all ran the installed copy."""
        places = self.work / "places"
        places.unlink(missing_ok=True)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(self.site.parent / "hook"), str(self.site)]),
            "CHECKOUT": str(REPOSITORY),
            "PLACES": str(places),
            "OMP_NUM_THREADS": "1",
            "PRUNE_OPD_CACHE": str(self.work / "cache"),  # empty: no model but the package's own
        }
        for name in ("RANK", "PRUNE_OPD_TINY_MODELS"):
            environment.pop(name, None)
        done = subprocess.run(
            [sys.executable, str(self.site / "bin" / "prune-opd"), *args],
            cwd=self.work,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert set(places.read_text().split()) == {str(self.site / "prune_opd" / "__init__.py")}
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    junk = shutil.ignore_patterns("__pycache__")
    for name in ("prune_opd", "recipes"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=junk)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source))
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--target", str(folder / "site"), str(wheel))
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(WITHOUT_THE_CHECKOUT)
    (folder / "work").mkdir()
    return Installed(folder / "site", folder / "work")


def pip(command: str, *args: str) -> None:
    """Without a network and without anybody's settings."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", command, "--no-index", *args],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------- the files


def test_the_wheel_holds_the_package_with_its_recipes_and_nothing_beside_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    version = "-".join(wheel.name.split("-")[:2])
    assert {name.split("/")[0] for name in names} == {"prune_opd", f"{version}.dist-info"}
    assert len(set(names)) == len(names)


def test_every_file_of_the_package_is_in_the_wheel_once(wheel: Path) -> None:
    expected = {
        place / path.relative_to(root)
        for root, place in (
            (REPOSITORY / "prune_opd", Path("prune_opd")),
            (REPOSITORY / "recipes", Path("prune_opd/recipes")),
        )
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {Path(name) for name in zipfile.ZipFile(wheel).namelist() if name.startswith("prune_opd/")}
    assert found == expected


# ---------------------------------------------------------------------------------------------------- the commands


def test_an_installed_copy_lists_every_recipe(installed: Installed) -> None:
    said = installed.run("recipes")
    assert all(name in said for name in list_recipes())


def test_an_installed_copy_plans_and_checks_a_large_recipe(installed: Installed) -> None:
    assert f"{LARGE} on 32 × h100" in installed.run("plan", LARGE)
    assert installed.run("check", "--structure", LARGE) == "ok\n"


def test_a_users_recipe_builds_on_those_of_an_installed_copy(installed: Installed) -> None:
    (installed.work / "mine.py").write_text(USER_RECIPE)
    assert installed.run("check", "--structure", "./mine.py") == "ok\n"


def test_an_installed_copy_trains_on_the_models_that_came_with_it(installed: Installed) -> None:
    assert installed.run("check", "tiny_compatible") == "ok\n"
    small = ("steps=1", "rollout.prompts=2", "horizon.max_len=64", "parallel.nproc=1", "evaluation.problems=0")
    installed.run("train", "tiny_compatible", *small, "checkpoint.export_hf=false", "track.wandb=disabled")
    assert (installed.work / "runs" / "tiny_compatible" / "metrics.jsonl").is_file()


def test_the_benchmarks_are_not_part_of_an_installed_copy(installed: Installed) -> None:
    said = installed.run("bench", "loss", code=1)
    assert "the benchmarks are not part of an installed copy" in said
