"""A teacher in a real vLLM server on the loopback teaches what the same one in the job does, to its rounding."""

from __future__ import annotations

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from prune_opd.config.rollout import MISMATCH_LIMIT
from tests.distributed.ranks import REPOSITORY, read_ranks, run_ranks
from tests.distributed.tiny_run import LENGTHS
from tests.end_to_end.runs import tiny_model

WORKER = Path(__file__).with_name("worker_served_teacher.py")
PACKAGES = REPOSITORY / ".venv-serve"
START_SECONDS = 420
UNKNOWN = ("reverse_kl", "teacher_entropy", "support_mass_teacher", "acceptance")

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny compatible pair: trained models, which are as sure as real ones."""
    folder = tmp_path_factory.mktemp("models")
    for which in ("student", "teacher"):
        shutil.copytree(tiny_model(which), folder / which)
    return folder


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address. As `make serve-teacher` starts it, from the folder that `make setup-serve` fills."""
    setup = ["bash", "scripts/setup_folder.sh", "serve", "serve"]
    made = subprocess.run(
        setup, cwd=REPOSITORY, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=300
    )
    assert made.returncode == 0, f"a server needs the packages of requirements/serve.txt\n{made.stderr}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "server.log"
    command = [sys.executable, "-m", "prune_opd.elsewhere.server", models / "teacher", "--port", port, "--k", 32]
    command += ["--", "--dtype", "float32", "--max-model-len", 512]
    path = os.pathsep.join([str(REPOSITORY), str(PACKAGES)])
    with log.open("w") as out:
        process = subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, process, log)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):  # its engine is a process of its own
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        assert process.poll() is None, f"the server has ended\n{log.read_text()[-3000:]}"
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"no server after {START_SECONDS} s\n{log.read_text()[-3000:]}")


@pytest.mark.parametrize(("ranks", "layout"), [(1, "DP"), (2, "DP"), (2, "TP")])
def test_it_teaches_the_same(tmp_path: Path, models: Path, server: str, ranks: int, layout: str) -> None:
    run_ranks(WORKER, ranks, [models, tmp_path, server, layout], timeout=500)
    of_rank = read_ranks(tmp_path, ranks)
    for kind in ("reverse", "bucket", "forward", "sampled"):
        for found in of_rank:
            here, there = found[kind]["in the job"], found[kind]["served"]
            assert here["layers"] > 0 == there["layers"] and there["record"]["served_rows"] == len(LENGTHS)
            for ours, theirs in zip(there["steps"], here["steps"], strict=True):
                # A bucket's loss (−.25) is what is left of terms as large as the divergence (14.2): 2e-3 of that.
                loss_nats = 2e-3 * theirs["divergence"] if kind == "bucket" else 1e-6
                alike(ours, theirs, *((1e-2, 1e-2) if kind == "bucket" else (1e-3, 1e-6)), loss_nats)
    kept_on_disk(of_rank[0])
    refused(of_rank)


def alike(ours: dict[str, Any], theirs: dict[str, Any], relative: float, nats: float, loss_nats: float) -> None:
    """Two engines in fp32: `MISMATCH_LIMIT` bounds their difference in a log-probability, a fiftieth of it is seen.

    The text is made up, so both models find it very unlikely (−118 nats a token), and a loss multiplies by that. The
    mass that a sure teacher leaves outside its best ids is known to rounding only: the bucket is as far off as that.
    How far is a matter of the processor: .02 nats of loss with vLLM's kernels for AVX2, below .01 with those for
    AVX-512.
    """
    for name in UNKNOWN:
        assert ours[name] is None and theirs[name] is not None, name
    assert abs(ours["teacher_logp"] - theirs["teacher_logp"]) < 0.1 * MISMATCH_LIMIT["fp32"]
    for name in ("overlap", "event_rate", "weight_mean", "reliable_length_B", "tokens", "updates", "microbatches"):
        assert ours[name] == theirs[name], name
    for name in ("loss", "divergence", "grad_norm", "weight_norm", "student_entropy"):
        near = loss_nats if name == "loss" else nats
        assert math.isclose(ours[name], theirs[name], rel_tol=relative, abs_tol=near), (name, ours[name], theirs[name])


def kept_on_disk(found: dict[str, Any]) -> None:
    """Rows of a server are kept too, and then nobody is asked."""
    first, second, only = found["kept"]
    assert first["steps"] == second["steps"] == only["steps"]
    assert [run["record"]["served_rows"] for run in (first, second, only)] == [len(LENGTHS), 0, 0]
    assert [run["record"]["cache_rows"] for run in (first, second, only)] == [0, len(LENGTHS), len(LENGTHS)]


def refused(of_rank: list[dict[str, Any]]) -> None:
    problems = of_rank[0]["refused"]
    assert all(found["refused"] == problems for found in of_rank)  # on every rank alike
    assert " serves teacher-" in problems["other weights"] and "`teacher` are student-" in problems["other weights"]
    assert "make serve-teacher" in problems["other weights"]
    assert "and teacher_server.model someone-elses" in problems["other name"]
    assert "GET /v1/models failed 1 times" in problems["nobody"] and "Cannot connect" in problems["nobody"]
    assert "takes 512 tokens" in problems["too long"] and "--max-model-len" in problems["too long"]
    assert "HTTP 400" in problems["too many ids"] and "--max-logprobs" in problems["too many ids"]
    assert "not the teacher that this run has begun with" in problems["exchanged"]
    assert of_rank[0]["self-test"] == ""  # it finds reference text likely
