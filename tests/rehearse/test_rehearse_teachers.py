"""A rehearsal with several teachers: each takes its turn on the device, and has the bytes that the plan gives it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

RECIPE = """
from dataclasses import replace
from prune_opd.config import DataConfig, TeacherConfig, TeacherLayout
from prune_opd.recipes.r1_1_5b_from_r1_7b_8xh100 import r1_1_5b_from_r1_7b_8xh100


def two():
    base = r1_1_5b_from_r1_7b_8xh100()
    teachers = {
        "large": TeacherConfig(base.teacher, parallel=TeacherLayout(tensor=2)),
        "small": TeacherConfig(base.student),
    }
    data, memory = DataConfig(mixture=("large.jsonl", "small.jsonl")), replace(base.memory, offload_teacher=True)
    return replace(base, name="two", teacher="", teachers=teachers, data=data, memory=memory)
"""


def test_teachers_take_turns_and_have_the_planned_bytes(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(RECIPE)
    command = [
        sys.executable,
        "-m",
        "prune_opd.cli",
        "rehearse",
        str(tmp_path / "two.py"),
        "--layers",
        "2",
        "--rank",
        "0",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    peaks = dict(re.findall(r"^    (teacher \w+) +[\d.]+ GB +(.*)$", done.stdout.partition("counted beside")[0], re.M))
    for name, other in (("large", "small"), ("small", "large")):
        assert f"teacher {name} " in peaks[f"teacher {name}"] and f"teacher {other} " not in peaks[f"teacher {name}"]
        counted, planned = re.findall(rf"^    teacher {name} +([\d.]+) GB +([\d.]+) GB$", done.stdout, re.M)[0]
        assert counted == planned and float(counted) > 0.5
    assert "PROBLEM" not in done.stdout
    assert "not rehearsed: working memory beside the plan, because teachers share it" in done.stdout
