"""What is on the device in which phase of a step: the one place that decides it.

    phase        student  gradients  optimizer  teacher  teacher's head  rollout weights  KV cache
    build                                                                      (come awake)
    sync            •                                                          •
    parity          •                                                          •             •
    rollout                                                                    •             •
    inflight                                        •          •               •             •
    reward, teacher                                 •          •
    train           •         •          •                     •
    average         •                               •          •
    evaluation                                                                 •             •
    checkpoint      •                    •
    export          •

A part that the recipe may move (`MemoryConfig`) is there in its phases only; everything else stays. On entering a
phase, first what it does not need leaves the device, then what it needs comes, so both are never there together. The
engine sleeps and wakes by vLLM's rules: its two parts go together, and may come one after the other (`staged_wake`):
weights, then the load of the new ones, then the KV cache.

Several teachers have a part each, `teacher NAME`, and one for all of their heads. Where a phase needs the teacher, the
one whose `turn` it is comes and the others leave, so the layers of two are never there together.

`transitions` is the schedule and nothing else; `MemoryPhases` carries it out, or only logs it (a dry run: the CPU).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from prune_opd.config import MemoryConfig

STUDENT, GRADIENTS, OPTIMIZER = "student", "gradients", "optimizer"
TEACHER, TEACHER_HEAD = "teacher", "teacher_head"
ROLLOUT_WEIGHTS, KV_CACHE = "rollout_weights", "kv_cache"
ENGINE = (ROLLOUT_WEIGHTS, KV_CACHE)
PARTS = (STUDENT, GRADIENTS, OPTIMIZER, TEACHER, TEACHER_HEAD, *ENGINE)

NEEDS: dict[str, tuple[str, ...]] = {
    "build": (),  # of the engine, whose two parts are there when it is over
    "sync": (STUDENT, ROLLOUT_WEIGHTS),
    "parity": (STUDENT, ROLLOUT_WEIGHTS, KV_CACHE),
    "rollout": (ROLLOUT_WEIGHTS, KV_CACHE),
    "inflight": (TEACHER, TEACHER_HEAD, ROLLOUT_WEIGHTS, KV_CACHE),  # a rollout that the teacher watches
    "reward": (TEACHER, TEACHER_HEAD),  # on the host; what comes next may come
    "teacher": (TEACHER, TEACHER_HEAD),  # a tied head is the embedding too
    "train": (STUDENT, GRADIENTS, OPTIMIZER, TEACHER_HEAD),  # the loss multiplies by the teacher's head
    "average": (STUDENT, TEACHER, TEACHER_HEAD),  # only where the teacher is the student's moving average
    "evaluation": (ROLLOUT_WEIGHTS, KV_CACHE),
    "checkpoint": (STUDENT, OPTIMIZER),
    "export": (STUDENT,),
}

EXCHANGE_BYTES = 512 * 2**20  # what a rank sends at once of the teacher's hidden states (megatron/redistribute.py)

logger = logging.getLogger(__name__)


class Transition(NamedTuple):
    """One thing that happens on entering a phase. `away` and `back` take one part; the engine's may take both."""

    action: str  # away | back; of the engine: sleep | wake
    parts: tuple[str, ...]

    @property
    def owner(self) -> str:
        """The part whose handler carries it out: both of the engine's have one."""
        return ROLLOUT_WEIGHTS if self.parts[0] in ENGINE else self.parts[0]

    def resident_after(self, resident: frozenset[str]) -> frozenset[str]:
        """The parts on the device once it has happened, of those that were `resident` before."""
        return resident.difference(self.parts) if self.action in ("away", "sleep") else resident.union(self.parts)

    def __str__(self) -> str:
        return f"{self.action} {' + '.join(self.parts)}"


def part_of(teacher: str) -> str:
    """The part of a teacher's layers. teacher: its name among several, "" where there is one."""
    return f"{TEACHER} {teacher}" if teacher else TEACHER


def parts_of(teachers: Sequence[str] = ()) -> tuple[str, ...]:
    """All parts of a run, in order. teachers: the names of several."""
    each = tuple(map(part_of, teachers)) or (TEACHER,)
    return tuple(part for one in PARTS for part in (each if one == TEACHER else (one,)))


def movable(memory: MemoryConfig, teachers: Sequence[str] = ()) -> tuple[str, ...]:
    """The parts that the recipe lets leave the device."""
    settings = {
        STUDENT: memory.offload_student,
        GRADIENTS: memory.offload_gradients,
        OPTIMIZER: memory.offload_optimizer,
        **dict.fromkeys(map(part_of, teachers or ("",)), memory.offload_teacher),
        TEACHER_HEAD: memory.offload_teacher,
        **dict.fromkeys(ENGINE, memory.sleep_level > 0),
    }
    return tuple(part for part in parts_of(teachers) if settings[part])


def transitions(
    memory: MemoryConfig, resident: frozenset[str], phase: str, teachers: Sequence[str] = (), turn: str = ""
) -> list[Transition]:
    """What has to happen, in order, to go from the parts that are `resident` to those of a phase.

    teachers: the names of several. turn: whose it is; "": nobody's yet, so that no layers are needed.
    """
    may_move, needs = movable(memory, teachers), set(NEEDS[phase])
    if teachers and TEACHER in needs:
        needs = needs - {TEACHER} | ({part_of(turn)} if turn else set())
    if not memory.staged_wake and ROLLOUT_WEIGHTS in needs:
        needs.add(KV_CACHE)
    found = []
    # vLLM drops the KV cache only together with the weights: an engine that is needed at all stays as it is.
    awake = tuple(part for part in ENGINE if part in may_move and part in resident)
    if awake and not needs.intersection(ENGINE):
        found.append(Transition("sleep", awake))
    others = [part for part in may_move if part not in ENGINE]
    found += [Transition("away", (part,)) for part in others if part in resident and part not in needs]
    found += [Transition("back", (part,)) for part in others if part not in resident and part in needs]
    if waking := tuple(part for part in ENGINE if part in needs and part not in resident):
        found.append(Transition("wake", waking))
    return found


Handler = Callable[[Transition], None]


class MemoryPhases:
    """Carries out the schedule of a run. Collective: every rank enters the same phases in the same order.

    handlers: by part, what carries a transition out; the engine's is that of `rollout_weights`. None: a dry run, which
    logs the transitions and moves nothing. record: a JSON file that gets the phases of the run up to its second sync,
    with their transitions and the parts that are resident afterwards: one whole step. teachers: the names of several.
    away: parts that have left the device already, while the run was built.
    """

    def __init__(
        self,
        memory: MemoryConfig,
        handlers: Mapping[str, Handler] | None = None,
        record: Path | None = None,
        teachers: Sequence[str] = (),
        away: Sequence[str] = (),
    ) -> None:
        self.memory, self.handlers, self.record = memory, handlers, record
        self.teachers, self.turn = tuple(teachers), ""
        self.phase: str | None = None
        self.resident = frozenset(parts_of(teachers)).difference(away)  # everything is built on the device
        self._entries: list[dict[str, object]] = []

    @property
    def dry(self) -> bool:
        return self.handlers is None

    @contextmanager
    def building_engine(self) -> Iterator[None]:
        """The engine is built in here, after student, optimizer and teacher, while what may move is away."""
        self.resident = self.resident.difference(ENGINE)
        self.enter("build")
        yield
        self.resident = self.resident.union(ENGINE)

    def take_turn(self, teacher: str) -> None:
        """It is this teacher's turn, of several, in the phase that the device is in."""
        if self.phase is not None:
            self.enter(self.phase, teacher)

    def enter(self, phase: str, turn: str = "") -> None:
        """Bring the device to what `phase` needs. Entering the phase that it is in does nothing.

        turn: which of several teachers it needs.
        """
        if (phase, turn) == (self.phase, self.turn) or not movable(self.memory, self.teachers):
            return
        self.phase, self.turn = phase, turn
        happened = transitions(self.memory, self.resident, phase, self.teachers, turn)
        for transition in happened:
            logger.debug("%s%s: %s", "dry run, " if self.dry else "", phase, transition)
            if self.handlers is not None:
                self.handlers[transition.owner](transition)
            self.resident = transition.resident_after(self.resident)
        self._write_down(phase, happened)

    def _write_down(self, phase: str, happened: list[Transition]) -> None:
        if self.record is None:
            return
        self._entries.append(
            {
                "phase": f"{phase} {self.turn}".rstrip(),
                "transitions": [str(transition) for transition in happened],
                "resident": [part for part in parts_of(self.teachers) if part in self.resident],
            }
        )
        self.record.parent.mkdir(parents=True, exist_ok=True)  # the engine is built before the run directory is
        self.record.write_text(json.dumps({"dry_run": self.dry, "phases": self._entries}, indent=1) + "\n")
        if phase == "sync" and any(entry["phase"] == "train" for entry in self._entries):
            self.record = None
