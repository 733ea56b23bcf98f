"""`prune-opd bench loss --quick`, its measurements in forks and two in new processes. No absolute times: other work
shares the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.loss.measure import make_inputs
from benchmarks.loss.rivals import nemo_rl
from prune_opd.config import ObjectiveConfig
from prune_opd.loss import Head, Method, Tokens, distill_loss
from tests.forked.client import REPOSITORY
from tests.forked.command import run_command

COMMAND = Path(sys.executable).with_name("prune-opd")
# Each process that has it leaves a line in the file `imported`: its program, and whether it had torch at its end.
AT_EXIT = """
import atexit, os, sys
atexit.register(lambda: open(os.environ["IMPORTED"], "a").write(f"{sys.argv[0]} {'torch' in sys.modules}\\n"))
"""
# The command with measurements that are there already, and two that are made: by a contender and by the count.
REPLAY = """
import json, sys
from pathlib import Path
from benchmarks.loss import command
from prune_opd.cli import main

measured, made, measure = json.loads(Path(sys.argv[1]).read_text()), set(), command.measure

def replay(module, request, *more, **options):
    if module not in made:
        made.add(module)
        (found,) = measure(module, request, *more, **options)
        assert found, module
    return [measured["raw"].pop(0) if module == "benchmarks.loss.measure" else measured["counted"]]

command.measure = replay
sys.argv = ["prune-opd", "bench", "loss", "--quick"]
main.main()
"""


def fresh(folder: Path, *command: Any) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """A command in new interpreters, run in `folder`; and what its processes left in `imported`."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(AT_EXIT)
    path = os.pathsep.join(map(str, filter(None, [folder / "site", REPOSITORY, os.environ.get("PYTHONPATH")])))
    env = {**os.environ, "PYTHONPATH": path, "IMPORTED": str(folder / "imported"), "COLUMNS": "160"}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=env, capture_output=True, text=True)
    return done, (folder / "imported").read_text().splitlines()


class Measured:
    """`prune-opd bench loss --quick`, whose processes are forked."""

    def __init__(self, folder: Path) -> None:
        done = run_command("bench", "loss", "--quick", folder=folder, env={"COLUMNS": "160"})
        assert done.code == 0, done.stderr
        self.stdout = done.stdout
        self.file = folder / "bench" / "loss.json"
        self.result: dict[str, Any] = json.loads(self.file.read_text())
        self.part: dict[str, Any] = self.result["vocabularies"][0]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return Measured(tmp_path_factory.mktemp("bench"))


def test_every_contender_is_measured(measured: Measured) -> None:
    contenders = {"ours", "ours_no_metrics", "ours_no_buffer", "ours_full", "naive", "nemo_rl", "floor"}
    contenders |= {"trl", "liger"} - measured.result["skipped"].keys()
    assert measured.part["contenders"].keys() == contenders
    in_bf16 = measured.result["bf16"][0]["contenders"]
    assert in_bf16.keys() == {"ours", "floor"}
    assert len(measured.result["raw"]) == len(contenders) + len(in_bf16) + len(measured.result["growth"])
    for row in measured.result["raw"]:
        assert all(seconds > 0 for seconds in row["wall_s"] + row["cpu_s"])


def test_ratios_are_those_of_the_medians(measured: Measured) -> None:
    ours, naive, floor, alone = (
        measured.part["contenders"][name] for name in ("ours", "naive", "floor", "ours_no_buffer")
    )
    ratios = measured.part["ratios"]
    assert ratios["extra_naive_over_ours"] == naive["extra_bytes"] / ours["extra_bytes"]
    assert ratios["extra_naive_over_ours_no_buffer"] == naive["extra_bytes"] / alone["extra_bytes"]
    assert ratios["time_ours_over_naive"] == ours["wall_s"] / naive["wall_s"]
    assert ratios["time_ours_over_floor"] == ours["wall_s"] / floor["wall_s"]
    plain = measured.part["contenders"]["ours_no_metrics"]
    assert ratios["cpu_ours_over_ours_no_metrics"] == ours["cpu_s"] / plain["cpu_s"]
    assert ratios["extra_ours_over_ours_no_metrics"] == ours["extra_bytes"] / plain["extra_bytes"]


def test_bf16_has_a_floor_of_its_own_and_the_same_loss(measured: Measured) -> None:
    (part,) = measured.result["bf16"]
    ours, floor = part["contenders"]["ours"], part["contenders"]["floor"]
    assert part["ratios"]["time_ours_over_floor"] == ours["wall_s"] / floor["wall_s"]
    assert part["ratios"]["cpu_ours_over_floor"] == ours["cpu_s"] / floor["cpu_s"]
    in_fp32 = measured.part["contenders"]["ours"]  # of inputs that are not rounded to bf16
    assert ours["loss"] != in_fp32["loss"]
    assert ours["loss"] == pytest.approx(in_fp32["loss"], rel=0.05)
    assert ours["grad_norms"] == pytest.approx(in_fp32["grad_norms"], rel=0.05)


def test_ours_and_naive_compute_the_same_loss_and_gradients(measured: Measured) -> None:
    naive = measured.part["contenders"]["naive"]
    assert measured.part["same_loss"]
    for name in ("ours", "ours_no_metrics", "ours_no_buffer"):
        row = measured.part["contenders"][name]
        assert row["loss"] == pytest.approx(naive["loss"], rel=1e-4)
        assert row["grad_norms"] == pytest.approx(naive["grad_norms"], rel=1e-4)
        assert row["grad_norms"][0] > 0 and row["grad_norms"][1] > 0


def test_rivals_are_held_against_ours_of_the_same_kind(measured: Measured) -> None:
    ratios, rows = measured.part["ratios"], measured.part["contenders"]
    assert ratios["time_ours_over_nemo_rl"] == rows["ours"]["wall_s"] / rows["nemo_rl"]["wall_s"]
    assert ratios["extra_nemo_rl_over_ours"] == rows["nemo_rl"]["extra_bytes"] / rows["ours"]["extra_bytes"]
    for rival in {"trl", "liger"} & rows.keys():
        assert ratios[f"time_ours_full_over_{rival}"] == rows["ours_full"]["wall_s"] / rows[rival]["wall_s"]
        assert rows[rival]["loss"] == pytest.approx(rows["ours_full"]["loss"], rel=1e-4)


def test_the_form_of_nemo_rl_computes_the_loss_of_ours_on_the_teachers_top_k() -> None:
    theirs, mine = (make_inputs(12, 64, (8, 16), 5) for _ in range(2))
    value = nemo_rl(theirs, k=6)
    loss, tokens, _ = distill_loss(
        Head(mine.student_hidden_NH, mine.student_weight_VH),
        Head(mine.teacher_hidden_NH, mine.teacher_weight_VH),
        Tokens(mine.sampled_ids_N, mine.cu_seqlens, vocab_size=64),
        Method(None, ObjectiveConfig("local_support_matching", k=6)),
    )
    loss.backward()
    assert value is not None
    torch.testing.assert_close(value, loss.detach() / tokens)
    for got, expected in zip(theirs[:2], mine[:2], strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-5)


def test_ours_needs_less_memory_than_full_logits(measured: Measured) -> None:
    ours, naive = (measured.part["contenders"][name] for name in ("ours", "naive"))
    assert ours["extra_bytes"] < naive["extra_bytes"] / 2


def test_environment_is_written_down(measured: Measured) -> None:
    assert measured.result["environment"]["cpus"] == os.cpu_count()
    assert measured.result["environment"].keys() >= {"torch", "threads", "cpu", "memory_gib", "python"}
    assert [line["tokens"] for line in measured.result["growth"]] == measured.result["settings"]["growth_tokens"]


def test_table_names_every_contender(measured: Measured) -> None:
    assert all(name in measured.stdout for name in measured.part["contenders"])


def test_a_measurement_is_a_new_process_and_the_command_itself_imports_no_torch(
    measured: Measured, tmp_path: Path
) -> None:
    done, imported = fresh(tmp_path, sys.executable, "-c", REPLAY, measured.file)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in measured.part["contenders"])
    with_torch = {line.split()[0]: line.endswith("True") for line in imported}
    assert len(imported) == 3 and with_torch.pop("prune-opd") is False
    assert [Path(name).name for name in with_torch] == ["measure.py", "count.py"] and all(with_torch.values())


def test_unknown_benchmark_is_one_line_with_the_nearest_name(tmp_path: Path) -> None:
    answer, _ = fresh(tmp_path, COMMAND, "bench", "lost")
    assert answer.returncode == 2
    assert answer.stderr == "error: there is no benchmark 'lost': did you mean 'loss'?\n"
    assert not (tmp_path / "bench").exists()
