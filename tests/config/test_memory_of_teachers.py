"""Several teachers on the device: their layers are never there together, and none is there before its turn."""

from __future__ import annotations

import json
from pathlib import Path

from prune_opd.config import MemoryConfig
from prune_opd.config.memory_phases import STUDENT, TEACHER_HEAD, MemoryPhases, Transition, movable, part_of, parts_of

EVERYTHING = MemoryConfig(
    sleep_level=2, offload_student=True, offload_gradients=True, offload_optimizer=True, offload_teacher=True
)
TEACHERS = ("maths", "code")
A, B = map(part_of, TEACHERS)
STEP = ("sync", "parity", "inflight", "teacher", "train", "checkpoint")


def test_one_teacher_has_the_part_that_it_always_had() -> None:
    assert part_of("") == "teacher" and "teacher" in parts_of() and A in parts_of(TEACHERS)
    assert set(movable(EVERYTHING, TEACHERS)) - set(movable(EVERYTHING)) == {A, B}
    assert not movable(MemoryConfig(), TEACHERS)


def test_layers_of_two_teachers_are_never_there_together_after_they_were_built() -> None:
    done: list[Transition] = []
    handlers = dict.fromkeys(parts_of(TEACHERS), done.append)
    run = MemoryPhases(EVERYTHING, handlers, teachers=TEACHERS, away=(A, B))
    with run.building_engine():
        pass
    for phase in STEP * 2:
        run.enter(phase)
        assert not {A, B} & run.resident
        for teacher in TEACHERS if phase in ("inflight", "teacher") else ():
            run.take_turn(teacher)
            assert {A, B} & run.resident == {part_of(teacher)}
            assert TEACHER_HEAD in run.resident and STUDENT not in run.resident
        if phase == "train":
            assert TEACHER_HEAD in run.resident
    order = [str(one) for one in done if one.parts[0] in (A, B)]
    assert order[:4] == [f"back {A}", f"away {A}", f"back {B}", f"away {B}"], "one leaves before the other comes"


def test_without_offloading_all_stay(tmp_path: Path) -> None:
    run = MemoryPhases(MemoryConfig(sleep_level=1), teachers=TEACHERS, record=tmp_path / "memory.json")
    run.enter("teacher")
    run.take_turn("code")
    assert {A, B} <= run.resident
    written = json.loads((tmp_path / "memory.json").read_text())
    assert written["dry_run"] and written["phases"][-1]["phase"] == "teacher code"
