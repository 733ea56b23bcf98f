"""What a machine with a GPU must have: imports that work, and folders for what is compiled."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from prune_opd.check import gpu
from prune_opd.check import run as check
from prune_opd.check.gpu import CACHES, cache_problems, import_problems
from prune_opd.config import HorizonConfig, TrainConfig


def package(folder: Path, name: str, text: str) -> None:
    path = folder.joinpath(*name.split("."))
    path.mkdir(parents=True)
    (path / "__init__.py").write_text(text)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages this process and those that it starts can import."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return tmp_path


def test_an_engine_that_lacks_a_package_is_named_with_it(installed: Path) -> None:
    """As in an image without onnx: find_spec sees Transformer Engine, and its import fails."""
    package(installed, "transformer_engine", "")
    package(installed, "transformer_engine.pytorch", "import onnx_that_nobody_has_installed")
    (line,) = import_problems()
    assert line.startswith("Transformer Engine is installed and cannot be imported (ModuleNotFoundError: No module")
    assert "onnx_that_nobody_has_installed" in line and "docker/pins.h100.txt" in line


def test_an_engine_that_megatron_core_does_not_take_is_named(installed: Path) -> None:
    package(installed, "transformer_engine", "")
    package(installed, "transformer_engine.pytorch", "")
    package(installed, "megatron.core.extensions.transformer_engine", "HAVE_TE = False")
    (installed / "megatron" / "__init__.py").touch()
    (installed / "megatron" / "core" / "__init__.py").touch()
    (installed / "megatron" / "core" / "extensions" / "__init__.py").touch()
    (line,) = import_problems()
    assert "cannot be imported (AssertionError)" in line


def test_a_kernel_of_apex_that_was_built_for_another_torch_is_named(installed: Path) -> None:
    package(installed, "torch", "")
    package(installed, gpu.APEX_KERNEL, "raise ImportError('undefined symbol: _ZN3c10')")
    (line,) = import_problems()
    assert line.startswith("apex's fused_weight_gradient_mlp_cuda is installed and cannot be imported")
    assert "undefined symbol" in line


def test_what_is_not_installed_is_no_problem() -> None:
    assert import_problems(program=(sys.executable, "-c", "raise SystemExit('it was started')")) == []


def test_a_folder_that_cannot_be_written_is_named_by_its_variable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    where = {name: str(tmp_path / name) for name in CACHES}
    assert cache_problems(where) == []
    (line,) = cache_problems({**where, "TRITON_CACHE_DIR": str(tmp_path / "file" / "triton")})
    assert line.startswith("TRITON_CACHE_DIR, where a GPU's kernels are compiled into,") and "is a file" in line


def test_a_job_on_a_gpu_tries_the_imports_and_a_machine_without_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, found in ((True, ["import", "cache"]), (False, [])):
        monkeypatch.setattr(check, "has_gpu", lambda has=has: has)
        monkeypatch.setattr(check, "check_train", lambda *_: [])
        monkeypatch.setattr(check, "machine_problems", lambda *_: [])
        monkeypatch.setattr(check, "import_problems", lambda: ["import"])
        monkeypatch.setattr(check, "cache_problems", lambda: ["cache"])
        nowhere = TrainConfig("run", student="nowhere", teacher="nowhere", steps=1, horizon=HorizonConfig("full"))
        assert check.check_everything(nowhere, 8, Path("run"), "auto") == found
