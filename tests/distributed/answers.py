"""What ranks are compared with, computed once for all of them and for all launches of a test file: it is the slow part.

The first launch computes each answer on its rank 0 and leaves all in a file, which further launches read. An answer is
found by everything that it is an answer to, tensors too: ranks that had made other inputs would find none.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.config import GateConfig, ObjectiveConfig, WeightingConfig
from prune_opd.loss import GateStats
from tests.reference import Case, Reference
from tests.reference_update import reference_update


class Answer(NamedTuple):
    """A loss in float64 and its gradients."""

    loss: Tensor
    hidden_gradient: Tensor
    weight_gradient: Tensor

    @staticmethod
    def of(loss: Tensor, case: Case) -> Answer:
        """From a loss of the case's leaves, which have no gradient yet."""
        if not case.sampled.numel():
            return Answer(loss.detach(), torch.zeros_like(case.student_hidden), torch.zeros_like(case.student_weight))
        loss.backward()
        return Answer(loss.detach(), *case.gradients())

    def times(self, factor: float) -> Answer:
        """The gradients are those of the loss times this."""
        return Answer(self.loss, factor * self.hidden_gradient, factor * self.weight_gradient)


class Answers:
    """Without a file, each rank computes its own."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._of: dict[str, Any] = {}
        self._complete = False

    def open(self, file: Path) -> None:
        """Read the file, or write it when this launch is done (`save`): on all ranks of the world alike."""
        self._file, self._complete = file, file.exists()
        if self._complete:
            self._of = torch.load(file, weights_only=False)

    def save(self) -> None:
        if self._file is not None and not self._complete and dist.get_rank() == 0:
            torch.save(self._of, self._file)

    def find(self, question: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        """question: all that the answer depends on."""
        if self._file is None:
            return compute()
        digest = hashlib.sha256()
        for part in question:
            _add(digest, part)
        name = digest.hexdigest()
        if name not in self._of:
            assert not self._complete, f"not what the first launch was asked: {question}"
            box = [compute() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(box)
            self._of[name] = box[0]
        return self._of[name]


ANSWERS = Answers()  # of this process


def _add(digest: Any, part: Any) -> None:
    if isinstance(part, Case):
        for field in dataclasses.fields(part):
            _add(digest, field.name)
            _add(digest, getattr(part, field.name))
    elif isinstance(part, Tensor):
        digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
        digest.update(part.detach().contiguous().view(torch.uint8).numpy().tobytes() if part.numel() else b"")
    else:
        digest.update(repr(part).encode() + b"\0")


def of_reference(
    case: Case, gate: GateConfig | None, objective: ObjectiveConfig, weighting: WeightingConfig
) -> tuple[Answer, Reference]:
    """The plain reference's answer, in float64 whatever the case's dtype."""

    def compute() -> tuple[Answer, Reference]:
        expected = case.leaves(torch.float64)
        reference = expected.reference(gate, objective, weighting)
        answer = Answer.of(reference.loss_sum, expected)
        return answer, reference._replace(loss_sum=answer.loss)

    result: tuple[Answer, Reference] = ANSWERS.find(("reference", case, gate, objective, weighting), compute)
    return result


def of_update(
    old: Case, moved: Case, gate: GateConfig | None, objective: ObjectiveConfig, weighting: WeightingConfig
) -> Answer:
    """The same of a student that has moved since."""

    def compute() -> Answer:
        expected = moved.leaves(torch.float64)
        return Answer.of(reference_update(old, expected, gate, objective, weighting), expected)

    result: Answer = ANSWERS.find(("update", old, moved, gate, objective, weighting), compute)
    return result


def seen_alone(stats: GateStats) -> tuple[list[bool], list[int], Tensor]:
    """What a single rank's statistics say to the bit."""
    return stats.event_N.tolist(), stats.reliable_length_B.tolist(), stats.overlap_N
