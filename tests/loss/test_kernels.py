"""`objective.kernels = triton` without a GPU: interpreted, compiled for a Hopper, counted, and refused.

Triton is in a folder of its own (`make setup-triton-test`), which only the processes that are started here see.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.loss.count import count
from prune_opd.config import ObjectiveConfig
from prune_opd.config.kernels import kernels_problem
from prune_opd.errors import ConfigError
from tests.distributed.ranks import REPOSITORY, read_ranks, run_ranks
from tests.loss.worker_kernels import COUNTED, IN_BF16, IN_FP32, OTHERS, ROUNDED, cases
from tests.reference import WEIGHTINGS, make_case
from tests.sharp import SHARP_TOLERANCE

WORKER = Path(__file__).with_name("worker_kernels.py")
TRITON = REPOSITORY / ".venv-triton"
TOLERANCE = {"float32": 2e-5, "sharp": SHARP_TOLERANCE}  # by the end of the case's name
REGISTERS, STACK = 128, 16  # that a thread may take: two programs of 8 warps on a multiprocessor; nothing is spilled


@pytest.fixture(scope="module")
def path() -> str:
    """A PYTHONPATH with Triton."""
    if not (TRITON / "triton").is_dir():
        pytest.skip("Triton is not in .venv-triton: run `make setup-triton-test` (200 MB)")
    return os.pathsep.join([str(REPOSITORY), str(TRITON)])


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the reference: the first launch writes the file, the second reads it."""
    return tmp_path_factory.mktemp("kernels") / "answers.pt"


@pytest.fixture(scope="module", params=[1, 2], ids=["tp 1", "tp 2"])
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, path: str, answers: Path
) -> list[Any]:
    folder, environment = tmp_path_factory.mktemp("kernels"), {"PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    run_ranks(WORKER, request.param, [folder, answers], timeout=800, env=environment, kind="fresh")
    return read_ranks(folder, request.param)


@pytest.mark.parametrize("part", [IN_FP32, IN_BF16, ROUNDED, OTHERS], ids=["fp32", "bf16", "rounded", "others"])
def test_every_objective_and_weighting_equals_the_reference(results: list[Any], part: dict[str, Any]) -> None:
    names = [name for name in cases(len(results)) if name in part]
    assert len(names) >= len(part) / (1 + len(WEIGHTINGS))  # on two ranks most objectives are without them
    for rank in results:
        for name in names:
            tolerance, errors = TOLERANCE.get(name.split()[-1], 1e-9), rank[name]
            assert max(errors["loss"], errors["hidden_gradient"], errors["weight_gradient"]) <= tolerance, (
                name,
                errors,
            )
            assert errors["statistics"] <= max(tolerance, 1e-7), (name, errors)  # overlap is float32


def test_a_student_that_equals_its_teacher_has_nothing_to_learn(results: list[Any]) -> None:
    assert [rank["twins"]["not silent"] for rank in results] == [[]] * len(results)


def test_logits_that_are_not_finite_raise_on_every_rank(results: list[Any]) -> None:
    for rank in results:
        assert rank["broken"].keys() == {"nan", "infinite"}
        assert all("student_hidden gives logits that are not finite" in said for said in rank["broken"].values())


@pytest.mark.parametrize("name", COUNTED)
def test_the_kernels_touch_the_logits_as_often_as_they_declare(results: list[Any], name: str) -> None:
    """By the addresses that the interpreter is asked for, beside the count of benchmarks/loss/count.py."""
    declared = count({**COUNTED[name], "kernels": "triton"}, 1, 151_936, (1536, 3584), 64)["passes"]
    for rank in results:
        assert rank["touched"][name] == [*declared, 1, 0]


def test_every_kernel_compiles_for_a_hopper(path: str, tmp_path: Path) -> None:
    """By Triton's own compiler, with no GPU: no thread keeps what it works on outside its registers."""
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.loss.compile_kernels"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name.partition(" ")[0] for name in found} == {"statistics", "rest", "divergence", "gradient"}
    for name, (registers, stack) in found.items():
        assert 0 < registers <= REGISTERS and stack <= STACK, name


def test_the_check_of_a_gpu_compares_both_paths(path: str, tmp_path: Path) -> None:
    """`make gpu-check`'s step, interpreted, at a size that this takes a few seconds for."""
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    program = (
        "import sys; from pathlib import Path; from scripts.gpu_check import SMALL, kernels_step, run; "
        "from tests.loss.quick_interpreter import quicken; quicken(); "
        "run(Path(sys.argv[1]), SMALL._replace(tokens=6, vocab=96), {'kernels': kernels_step})"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu-check.json").read_text(encoding="utf-8"))
    assert [row["passed"] for row in rows] == 3 * [True, True, None]
    assert all("triton" in row["figure"] and "torch" in row["figure"] for row in rows[2::3])


# ---------------------------------------------------------------------------------------------------- refused


def test_kernels_without_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"objective\.kernels = triton needs a GPU, .*objective\.kernels=torch"):
        make_case().fused(objective=ObjectiveConfig(k=6, kernels="triton"))
    assert kernels_problem("torch", gpu=False) is None


@pytest.mark.parametrize("gpu", [False, True])
def test_kernels_without_triton_are_refused(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs the package triton" in (kernels_problem("triton", gpu) or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert kernels_problem("triton", gpu) is None
