"""The schedule of the memory phases, without a device: which part moves when, and in what order."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path

import pytest

from prune_opd.config import MemoryConfig
from prune_opd.config.memory_phases import ENGINE, NEEDS, PARTS, MemoryPhases, Transition, movable, transitions

EVERYTHING = MemoryConfig(
    sleep_level=2, offload_student=True, offload_gradients=True, offload_optimizer=True, offload_teacher=True
)
STEP = ("sync", "rollout", "teacher", "train")
ALL_SETTINGS = [
    MemoryConfig(level, staged, *offloads)
    for level in (0, 1, 2)
    for staged in (True, False)
    for offloads in itertools.product((False, True), repeat=4)
]


def carried_out(memory: MemoryConfig, *phases: str) -> list[str]:
    """`phase: transition` of everything that a run does."""
    done: list[str] = []
    run: MemoryPhases
    handlers = dict.fromkeys(PARTS, lambda transition: done.append(f"{run.phase}: {transition}"))
    run = MemoryPhases(memory, handlers)
    for phase in phases:
        run.enter(phase)
    return done


def test_a_step_with_everything_on_wakes_loads_sleeps_and_moves_in_this_order() -> None:
    first = len(carried_out(EVERYTHING, *STEP))
    assert carried_out(EVERYTHING, *STEP, *STEP)[first:] == [
        "sync: away gradients",
        "sync: away optimizer",
        "sync: away teacher_head",
        "sync: wake rollout_weights",  # then the load of the new ones
        "rollout: away student",
        "rollout: wake kv_cache",
        "teacher: sleep rollout_weights + kv_cache",
        "teacher: back teacher",
        "teacher: back teacher_head",
        "train: away teacher",
        "train: back student",
        "train: back gradients",
        "train: back optimizer",
    ]


def test_scoring_a_steps_responses_moves_nothing_twice() -> None:
    """It is on the host: the engine sleeps before it instead of after, and the teacher comes."""
    scored = ("sync", "rollout", "reward", "teacher", "train")
    with_it, without = (carried_out(EVERYTHING, *phases, *phases) for phases in (scored, STEP))
    assert [line.partition(": ")[2] for line in with_it] == [line.partition(": ")[2] for line in without]
    assert not [line for line in with_it if line.startswith("teacher:")]


def test_the_engine_is_built_when_all_that_may_move_is_away_and_comes_awake() -> None:
    """vLLM takes its share of what is free: 4B student, gradients and teacher would leave it half of a GPU."""
    done: list[str] = []
    run = MemoryPhases(EVERYTHING, dict.fromkeys(PARTS, lambda transition: done.append(str(transition))))
    with run.building_engine():
        assert run.resident == frozenset()
        assert done == [f"away {part}" for part in PARTS if part not in ENGINE]
    assert run.resident == frozenset(ENGINE)
    done.clear()
    run.enter("sync")
    assert done == ["back student"], "the engine is awake already"


def test_a_resumed_run_has_the_optimizer_back_before_it_is_filled() -> None:
    done: list[str] = []
    run = MemoryPhases(EVERYTHING, dict.fromkeys(PARTS, lambda transition: done.append(str(transition))))
    with run.building_engine():
        done.clear()
    run.enter("checkpoint")
    assert done == ["sleep rollout_weights + kv_cache", "back student", "back optimizer"]


def test_unstaged_wake_brings_the_cache_before_the_load() -> None:
    memory = MemoryConfig(sleep_level=1, staged_wake=False)
    assert carried_out(memory, *STEP, *STEP) == [
        "teacher: sleep rollout_weights + kv_cache",
        "sync: wake rollout_weights + kv_cache",
        "teacher: sleep rollout_weights + kv_cache",
    ]


def test_the_first_sync_finds_an_engine_that_is_awake_and_compares_before_the_rollout() -> None:
    memory = MemoryConfig(sleep_level=2, offload_student=True)
    assert carried_out(memory, "sync", "parity", "rollout") == ["rollout: away student"]


def test_an_evaluation_keeps_the_engine_awake_for_the_next_step() -> None:
    memory = MemoryConfig(sleep_level=2)
    assert carried_out(memory, "train", "sync", "evaluation", "sync", "rollout") == [
        "train: sleep rollout_weights + kv_cache",
        "sync: wake rollout_weights",
        "evaluation: wake kv_cache",
    ]


def test_a_checkpoint_has_masters_and_moments_on_the_device() -> None:
    assert carried_out(MemoryConfig(offload_optimizer=True), "rollout", "checkpoint") == [
        "rollout: away optimizer",
        "checkpoint: back optimizer",
    ]


@pytest.mark.parametrize("memory", ALL_SETTINGS)
def test_every_phase_has_what_it_needs_and_leaving_comes_before_coming(memory: MemoryConfig) -> None:
    resident = frozenset(PARTS)
    for phase in (
        *STEP,
        "sync",
        "rollout",
        "reward",
        "teacher",
        "train",
        "sync",
        "parity",
        *STEP,
        "sync",
        "evaluation",
        "checkpoint",
        *STEP,
        "export",
    ):
        happened = transitions(memory, resident, phase)
        coming = [transition.action in ("back", "wake") for transition in happened]
        assert coming == sorted(coming)
        for transition in happened:
            leaves = transition.action in ("away", "sleep")
            assert set(transition.parts) <= (resident if leaves else frozenset(PARTS) - resident)
            resident = resident - set(transition.parts) if leaves else resident | set(transition.parts)
        assert set(NEEDS[phase]) <= resident
        moved = {part for transition in happened for part in transition.parts}
        assert moved <= set(movable(memory))
        # What may move and is not needed is gone; of the engine, only where neither of its parts is needed.
        idle = set(movable(memory)) - set(NEEDS[phase])
        idle -= set(ENGINE) if set(ENGINE) & set(NEEDS[phase]) else set()
        assert not idle & resident
        assert transitions(memory, resident, phase) == []


def test_nothing_moves_with_everything_off(tmp_path: Path) -> None:
    assert carried_out(MemoryConfig(), *STEP, "evaluation", "checkpoint", "export") == []
    run = MemoryPhases(MemoryConfig(), record=tmp_path / "memory.json")
    run.enter("sync")
    assert not (tmp_path / "memory.json").exists()


def test_a_dry_run_logs_the_same_transitions_and_writes_one_whole_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    phases = ("sync", "parity", *STEP[1:], *STEP, *STEP)
    record = tmp_path / "memory.json"
    run = MemoryPhases(EVERYTHING, record=record)
    with caplog.at_level(logging.DEBUG, logger="prune_opd.config.memory_phases"):
        for phase in phases:
            run.enter(phase)
    assert run.dry
    assert [message.removeprefix("dry run, ") for message in caplog.messages] == carried_out(EVERYTHING, *phases)
    written = json.loads(record.read_text())
    assert written["dry_run"] is True
    assert [entry["phase"] for entry in written["phases"]] == ["sync", "parity", *STEP[1:], "sync"]
    assert written["phases"][-1]["transitions"][-1] == "wake rollout_weights"
    assert written["phases"][2]["resident"] == ["rollout_weights", "kv_cache"]


def test_the_engine_has_one_handler_for_its_two_parts() -> None:
    assert Transition("wake", ("kv_cache",)).owner == Transition("sleep", ENGINE).owner == "rollout_weights"
