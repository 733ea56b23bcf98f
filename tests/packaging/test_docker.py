"""The image's files: hadolint, shellcheck, exact pins, and an apex that can only be NVIDIA's."""

import ast
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKER = REPOSITORY / "docker"
PIN = re.compile(r"[A-Za-z0-9._-]+==[^=\s;]+")


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert all(PIN.fullmatch(line) for line in lines)
    return dict(line.split("==") for line in lines)


def test_the_h100_set_is_exact_and_the_one_that_was_resolved_together() -> None:
    found = pins(DOCKER / "pins.h100.txt") | pins(DOCKER / "pins.h100-build.txt")
    # fmt: off
    wanted = {
        "torch": "2.13.0", "torchvision": "0.28.0", "torchaudio": "2.11.0", "triton": "3.7.1", "psutil": "7.2.2",
        "megatron-core": "0.16.1", "vllm": "0.32.0", "transformers": "5.19.0", "numpy": "2.3.5", "numba": "0.65.0",
        "flashinfer-python": "0.7.0.post1", "flash-attn": "2.8.3", "transformer-engine": "2.11.0",
        "transformer-engine-cu13": "2.11.0", "transformer-engine-torch": "2.11.0",
    }
    # fmt: on
    assert wanted.items() <= found.items()
    by_hand = [line for line in (DOCKER / "pins.h100.in").read_text().splitlines() if "==" in line and line[0] != "#"]
    assert dict(line.split("==") for line in by_hand).items() <= found.items()


# What is imported → the package that brings it, where the names differ.
BRINGS = {"megatron": "megatron-core", "yaml": "pyyaml", "annotated_types": "annotated-types"}
IN_A_CHECKOUT = ("benchmarks",)  # of this repository, and not in the image


def imported(folder: Path) -> set[str]:
    """First parts of the names of all modules that a package's files import, anywhere in them."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found


def test_everything_that_the_product_imports_is_in_the_h100_set() -> None:
    """Without pyarrow an image could read no Parquet file: nothing but a run would have shown it."""
    names = imported(REPOSITORY / "prune_opd") - set(sys.stdlib_module_names) - {"prune_opd", *IN_A_CHECKOUT}
    assert {"pyarrow", "reasoning_gym", "tensorboardX", "torch", "vllm"} <= names
    pinned = {canonicalize_name(name) for name in pins(DOCKER / "pins.h100.txt")}
    missing = {name for name in names if canonicalize_name(BRINGS.get(name, name)) not in pinned}
    assert not missing


def test_everything_that_the_launcher_imports_is_in_its_own_set() -> None:
    """A login node has no torch, and so nothing of the image's set."""
    names = imported(REPOSITORY / "launch") - set(sys.stdlib_module_names) - {"launch", "prune_opd"}
    assert {"nemo_run", "yaml"} <= names
    pinned = {canonicalize_name(name) for name in pins(REPOSITORY / "requirements" / "launch.txt")}
    assert not {name for name in names if canonicalize_name(BRINGS.get(name, name)) not in pinned}


def test_transformer_engine_is_tested_with_the_packages_of_the_image() -> None:
    """Its PyTorch half imports onnx and onnxscript at once, and is compiled in the image without its dependencies."""
    tested = pins(REPOSITORY / "requirements" / "te-test.txt")
    image = {canonicalize_name(name): version for name, version in pins(DOCKER / "pins.h100.txt").items()}
    assert {"onnx", "onnxscript", "transformer-engine"} <= tested.keys()
    assert {canonicalize_name(name): version for name, version in tested.items()}.items() <= image.items()


def test_the_losss_kernels_are_tested_with_the_triton_of_the_image() -> None:
    tested = pins(REPOSITORY / "requirements" / "triton-test.txt")
    assert tested == {"triton": pins(DOCKER / "pins.h100.txt")["triton"]}


def test_flash_attn_is_compiled_only_where_it_is_asked_for() -> None:
    """On Hopper Transformer Engine takes cuDNN's attention: hours of compiling for nothing."""
    script, dockerfile = (DOCKER / "install_python.sh").read_text(), (DOCKER / "Dockerfile").read_text()
    assert 'ARG FLASH_ATTN=""' in dockerfile
    assert "grep -v '^flash-attn'" in script and '"${FLASH_ATTN:-}"' in script


def test_the_launch_set_is_exact_and_has_no_torch() -> None:
    found = {name.lower(): version for name, version in pins(REPOSITORY / "requirements" / "launch.txt").items()}
    assert found["nemo_run"] == "0.11.1"
    assert tuple(map(int, found["leptonai"].split(".")[:2])) < (0, 47)  # from 0.47 on nemo_run does not import
    assert "torch" not in found and "vllm" not in found


def test_no_dependency_file_can_bring_the_package_indexs_apex() -> None:
    files = [*REPOSITORY.glob("requirements/*"), *DOCKER.iterdir(), *REPOSITORY.glob("scripts/*.sh")]
    files += [REPOSITORY / "pyproject.toml", REPOSITORY / "Makefile", *REPOSITORY.glob(".ci/*")]
    files.remove(DOCKER / "h100-check.txt")  # what a check has said, and nothing reads
    asks = re.compile(r"^\s*[\"']?apex\b(?!\.commit)|install\b[^\n#]*\s[\"']?apex\b(?!\.commit)", re.IGNORECASE)
    for path in files:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
        assert not [line for line in lines if asks.search(line)], path
    assert asks.search("apex==0.9.10") and asks.search("pip install -q apex")  # it would have seen one
    assert re.fullmatch(r"[0-9a-f]{40}\n", (DOCKER / "apex.commit").read_text())
    assert "https://github.com/NVIDIA/apex.git" in (DOCKER / "install_python.sh").read_text()


def test_of_apex_one_kernel_is_compiled_under_the_name_that_megatron_core_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """setuptools and torch's extensions are stand-ins that keep what they are given; nothing is compiled."""
    from prune_opd.check.gpu import APEX_KERNEL

    kept: dict[str, Any] = {}
    cpp: Any = ModuleType("torch.utils.cpp_extension")
    cpp.BuildExtension = object()
    cpp.CUDAExtension = lambda name, sources, **settings: {"name": name, "sources": sources, **settings}
    tools: Any = ModuleType("setuptools")
    tools.setup = lambda **settings: kept.update(settings)
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", cpp)
    monkeypatch.setitem(sys.modules, "setuptools", tools)
    monkeypatch.setenv("KERNEL_VERSION", "0.1+abc")
    runpy.run_path(str(shutil.copy(DOCKER / "apex_kernel.py", tmp_path / "setup.py")))
    (extension,) = kept["ext_modules"]
    assert kept["name"] == extension["name"] == APEX_KERNEL and kept["version"] == "0.1+abc"
    assert kept["packages"] == kept["py_modules"] == []  # above all no package `apex`
    assert extension["include_dirs"] == [str(tmp_path / "csrc")]
    assert extension["sources"] == [
        f"csrc/megatron/fused_weight_gradient_dense{part}" for part in (".cpp", "_cuda.cu", "_16bit_prec_cuda.cu")
    ]


def test_the_image_runs_without_root_and_builds_for_h100() -> None:
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^USER 1000", text, re.MULTILINE)
    assert "ARG NVTE_CUDA_ARCHS=90" in text
    assert not re.search(r"(TOKEN|SECRET|PASSWORD|API_KEY)", text)


def test_hadolint_finds_nothing() -> None:
    installed = REPOSITORY / ".venv-launch" / "bin" / "hadolint"
    hadolint = str(installed) if installed.is_file() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (make setup-launch brings it)")
    done = subprocess.run([hadolint, str(DOCKER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_shellcheck_finds_nothing_in_our_scripts() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (scripts/setup_slurm_test.sh brings it)")
    scripts = [*DOCKER.glob("*.sh"), *(REPOSITORY / "scripts").glob("*.sh")]
    done = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
