"""`make gpu-check` in a small size on the CPU: every step runs, one that fails does not end the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prune_opd import platform
from scripts import gpu_check, gpu_check_folder
from scripts.gpu import engine, loss, reload, variants
from scripts.gpu.rows import FULL, SMALL, Row
from scripts.gpu_check import run
from tests.distributed.ranks import REPOSITORY

# What a machine has that has torch and numpy: those, what torch itself needs, and Triton.
# fmt: off
BARE = (
    "torch", "torchgen", "functorch", "numpy", "numpy.libs", "triton", "sympy", "mpmath", "networkx", "jinja2",
    "markupsafe", "fsspec", "filelock", "typing_extensions.py", "setuptools", "_distutils_hack",
)
# fmt: on


def bare_packages(folder: Path) -> Path:
    """A folder of packages with nothing but those of BARE that are installed here."""
    folder.mkdir()
    for name in BARE:
        if (found := Path(torch.__file__).parents[1] / name).exists():
            (folder / name).symlink_to(found)
    return folder


def test_every_step_runs_on_a_machine_that_has_torch_alone(tmp_path: Path) -> None:
    """From the folder that is carried there, which has no vLLM and no transformers; on the CPU, in a small size."""
    folder = tmp_path / "carried"
    assert gpu_check_folder.make(folder) < gpu_check_folder.LIMIT
    bare = {"PYTHONPATH": str(bare_packages(tmp_path / "bare")), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-S", str(folder / "run.py"), "--small", "--out", str(tmp_path / "out")],  # -S: no other ones
        cwd=tmp_path,
        env={**os.environ, **bare},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [Row(**row) for row in json.loads((tmp_path / "out" / "gpu-check.json").read_text())]
    assert rows[0].what == "device"
    assert [row.step for row in dict.fromkeys(rows) if row.passed is False] == []
    assert {row.step for row in rows} == set(gpu_check.STEPS)
    found = {(row.step, row.what): row for row in rows}
    assert found["machine", "megatron.core"].passed  # carried
    assert found["machine", "vllm"].figure == found["engine", "runs with vLLM"].figure.replace(" (no vllm)", "")
    gradients = [float(row.figure) for row in rows if row.step == "loss" and "gradient" in row.what]
    assert len(gradients) == 4 and all(0 < error < 2e-2 for error in gradients)
    for step in ("experts", "reload"):
        assert {row.figure for row in rows if row.step == step} == {"not here (no vllm)"}
    held = {row.step for row in rows if row.passed}
    # No CPU holds the others.
    assert held == {"machine", "loss", "ties", "variants", "mover", "steps", "trouble", "checkpoint"}
    page = (tmp_path / "out" / "gpu-check.md").read_text()
    assert all(f"| {row.step} | {row.what} |" in page for row in rows)
    assert all(f"\n| {step} | {gpu_check.ESTIMATED[step]} | " in page for step in gpu_check.STEPS)


def test_the_steps_of_the_kernels_run_interpreted(tmp_path: Path) -> None:
    """By Triton's interpreter as it is, which other tests quicken (tests/loss/quick_interpreter.py)."""
    triton = REPOSITORY / ".venv-triton"
    if not (triton / "triton").is_dir():
        pytest.skip("Triton is not in .venv-triton: run `make setup-triton-test` (200 MB)")
    path = os.pathsep.join([str(REPOSITORY), str(triton)])
    program = [sys.executable, "scripts/gpu_check.py", "--small", "--steps", "kernels", "variants", "--out"]
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*program, str(tmp_path)], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [Row(**row) for row in json.loads((tmp_path / "gpu-check.json").read_text())]
    assert not [row for row in rows if row.figure.startswith("not here")]
    assert len([row for row in rows if row.step == "kernels" and row.passed]) == 6  # objectives × formats
    assert {row.what: row.passed for row in rows}["gradients by tiles and warps"]


def test_all_steps_are_reckoned_to_take_ten_minutes() -> None:
    assert gpu_check.ESTIMATED.keys() == gpu_check.STEPS.keys()
    assert sum(gpu_check.ESTIMATED.values()) <= 600


LOADED = {
    "tensors": 100, "bytes": 10**9, "buckets": 2, "seconds": [0.2, 0.004, 0.004], "away": [0.01, 0.02, 0.01],
    "asynchronous": True, "ids": [[5, 6, 7], [8, 9]], "logprobs": [[-1.0, -1.0, -1.0], [-1.0, -1.0]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs", "wrong"),
    [
        ({}, {}, []),
        ({"seconds": [0.2, 0.1, 0.1]}, {}, ["sync"]),
        ({"away": [0.01, 0.6, 0.01]}, {}, ["|Δ|"]),
        ({"asynchronous": False}, {}, ["schedules"]),
        ({}, {"ids": [[5, 6, 4], [8, 9]]}, ["beside"]),
        ({}, {"logprobs": [[-1.0, -1.0, -1.1], [-1.0, -1.0]]}, ["beside"]),
    ],
    ids=["as it should be", "slow", "far from the trainer", "in step", "another token", "other log-probabilities"],
)
def test_what_is_wrong_with_an_engine_after_reloads_fails(
    ours: dict[str, Any], theirs: dict[str, Any], wrong: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes are stand-ins; the figures are held as on a GPU."""
    found = {"loaded": LOADED | ours, "fresh": LOADED | theirs}
    monkeypatch.setattr(reload, "_process", lambda kind, folder: found[kind])
    monkeypatch.setattr(reload.importlib.util, "find_spec", lambda name: object())
    gpu = platform.Platform("cuda", platform.META, "nccl")
    rows = list(reload.experts_step(gpu, FULL))
    assert {row.what.partition(":")[0] for row in rows} == {"bf16", "fp8_per_tensor"}
    failed = [row.what.partition(": ")[2].split()[0] for row in rows if row.passed is False]
    assert failed == wrong + wrong  # of both formats
    assert [row.passed for row in reload.reload_step(gpu, FULL)].count(False) == len(set(wrong) - {"sync"})


def test_a_format_whose_engine_falls_over_does_not_keep_the_next_one_from_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def falls(kind: str, folder: Path) -> Any:
        raise RuntimeError("the loaded engine ended with exit code 1: no kernel")

    monkeypatch.setattr(reload, "_process", falls)
    monkeypatch.setattr(reload.importlib.util, "find_spec", lambda name: object())
    rows = list(reload.experts_step(platform.Platform("cuda", platform.META, "nccl"), FULL))
    assert [(row.what, row.passed) for row in rows] == [("bf16", False), ("fp8_per_tensor", False)]
    assert all("no kernel" in row.figure for row in rows)


def test_a_top_k_by_blocks_that_differs_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = platform.prepare()
    rows = list(variants._blocks(cpu, SMALL, 18_992))  # a rank's columns at TP 8
    assert rows[0].what.startswith("top 16 of 18992") and rows[0].passed
    ties_to_any = lambda values, ids, k: values.topk(k).indices  # noqa: E731
    monkeypatch.setattr(variants.vocab_parallel, "_largest", ties_to_any)
    assert not next(variants._blocks(cpu, SMALL, 18_992)).passed


def test_the_carried_folder_has_nothing_that_is_compiled_for_one_python(tmp_path: Path) -> None:
    gpu_check_folder.make(tmp_path)
    compiled = {path.name for path in tmp_path.rglob("*.so")}
    assert compiled == {"_psutil_linux.abi3.so", "_safetensors_rust.abi3.so"}


def test_a_step_that_fails_is_said_and_the_others_go_on(tmp_path: Path) -> None:
    def breaks(machine: Any, size: Any) -> Iterator[Row]:
        yield Row("first", "before it", "1", "1", True)
        raise RuntimeError("the device fell off")

    rows = run(tmp_path, SMALL, {"first": breaks, "mover": gpu_check.mover_step})
    assert [(row.step, row.passed) for row in rows[:2]] == [("first", True), ("first", False)]
    assert "the device fell off" in rows[1].figure
    assert rows[2].step == "mover" and rows[2].passed


def test_wrong_gradients_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = loss._gradients

    def wrong(machine: Any, size: Any, dtype: Any, precision: Any) -> Any:
        hidden, weight = exact(machine, size, dtype, precision)
        return (hidden * 1.05 if precision == dtype else hidden), weight

    monkeypatch.setattr(loss, "_gradients", wrong)
    rows = run(tmp_path, SMALL, {"loss": loss.loss_step})
    assert [row.passed for row in rows if "hidden gradient" in row.what] == [False, False]


def test_ties_that_are_settled_otherwise_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loss._loss

    def highest_ids_first(inputs: Any, size: Any, method: Any) -> Any:
        """The teacher's ids are numbered from the other end, as if the student had taken the highest ones."""
        ours, theirs = inputs
        return real((ours, [theirs[0], theirs[1].flip(0)]), size, method)

    monkeypatch.setattr(loss, "_loss", highest_ids_first)
    rows = run(tmp_path, SMALL, {"ties": loss.ties_step})
    assert [row.passed for row in rows if "rows of equal logits" in row.what][:2] == [False, False]


def _program(code: int, steps: int, stopped: int = 4) -> Any:
    """A stand-in for a run, which writes records as the program does."""
    record = {"tokens_trained": 9, "mismatch_mean": 1e-3, "time_step": 2.0, "pruned_inflight": stopped}

    def program(command: list[str], **_: Any) -> Any:
        run_dir = Path(command[command.index("--run-dir") + 1])
        run_dir.mkdir()
        (run_dir / "metrics.jsonl").write_text(f"{json.dumps(record)}\n" * steps)
        return SimpleNamespace(returncode=code, stdout="", stderr="the engine fell over\n")

    return program


def test_a_run_that_stops_nothing_in_flight_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.subprocess, "run", _program(0, 3, stopped=0))
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: object())
    rows = list(engine.engine_step(platform.Platform("cuda", platform.META, "nccl"), SMALL))
    assert [row.what for row in rows if not row.passed] == [engine.STOPPED]


@pytest.mark.parametrize(("code", "steps", "passed"), [(0, 3, True), (0, 2, False), (1, 3, False)])
def test_a_run_with_vllm_counts_by_its_exit_code_and_its_steps(
    code: int, steps: int, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.subprocess, "run", _program(code, steps))
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: object())
    gpu = platform.Platform("cuda", platform.META, "nccl")
    rows = list(engine.engine_step(gpu, SMALL))
    assert [row.what for row in rows] == list(engine.RUNS)
    assert {row.passed for row in rows} == {passed}
    assert all("stopped, |Δ| 1.0e-03" in row.figure if passed else "the engine fell over" in row.figure for row in rows)


def test_the_runs_with_vllm_have_settings_that_there_are() -> None:
    from prune_opd.config.recipe import load_recipe

    for settings in (*engine.RUNS.values(), *engine.ON_A_CPU.values()):
        load_recipe("tiny_compatible", [*engine.COMMON, *settings])
