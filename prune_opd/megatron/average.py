"""The moving average of the student's weights, as its own teacher (`teacher = ema`).

    after each step:   average ← decay · average + (1 − decay) · student   in fp32, in host memory
                       teacher ← average                                   in its own number format

A bf16 weight would not see the small steps of an average (2⁻⁸ of its value is about the least that it can move), so the
fp32 one is what is kept and saved. It costs 4 bytes for each of a rank's teacher weights, on the host.

Where the teacher lies like the student, each rank averages its own shards. Otherwise the student goes through the
resharding stream (weights/stream.py), and each rank takes its teacher's part of every whole tensor: the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from prune_opd.weights.adapters import merged
from prune_opd.weights.cut import VOCABULARY
from prune_opd.weights.mapping import Entry, entries, local_parameters
from prune_opd.weights.stream import Resharder

if TYPE_CHECKING:
    from prune_opd.megatron.model import HiddenStatesGPT
    from prune_opd.megatron.teacher import Teacher

PREFIX = "teacher_ema."  # of its tensors in a checkpoint, before their Hugging Face names
HEAD = f"{PREFIX}head"


class MovingAverage:
    """Keeps a teacher at the moving average of a student (`chunks`). Both start from the same directory."""

    def __init__(self, teacher: Teacher, chunks: Sequence[HiddenStatesGPT], decay: float, bucket_mb: float) -> None:
        self.teacher, self.chunks, self.decay = teacher, chunks, decay
        self.resharder = Resharder(chunks, bucket_mb)
        self.weights = local_parameters(teacher.chunks)
        self.averages = {name: _host_copy(weight) for name, weight in self.weights.items()}
        self.entries = [entry for entry in entries(teacher.spec) if entry.megatron in self.weights]
        self.head: Tensor | None = None  # of the output matrix that the loss has, on the student's last stage
        if teacher.layout.student.is_last_stage:
            alias = next((n for n, w in self.weights.items() if w.data_ptr() == teacher.head_weight.data_ptr()), None)
            self.head = _host_copy(teacher.head_weight) if alias is None else self.averages[alias]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the student as it is now. Collective over the job; both models are on the device."""
        for name, weight in self._student():
            self._mix(self.averages[name], weight, self.weights[name])
        if self.head is not None and self._has_own_head:
            self._mix(self.head, self.chunks[-1].head_weight(), self.teacher.head_weight)

    @torch.no_grad()
    def show(self) -> None:
        """Give the teacher the average as it is: after a checkpoint was loaded. The teacher is on the device."""
        for name, average in self.averages.items():
            self.weights[name].copy_(average)
        if self.head is not None and self._has_own_head:
            self.teacher.head_weight.copy_(self.head)

    def sharded_state(self) -> dict[str, ShardedTensor]:
        """The average for megatron's distributed checkpoint, which any layout of either model can load."""
        state = {key: tensor for entry in self.entries for key, tensor in self._sharded(entry)}
        if self.head is not None:  # also where it is the embedding: in another layout it may not be
            groups = self.teacher.layout.student.groups
            state[HEAD] = _shard(HEAD, self.head, 0, groups.tp.rank(), groups.tp.size(), (0, 0, groups.dp_cp.rank()))
        return state

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take over the average of a checkpoint: `sharded_state`, filled. `show` gives it to the teacher."""
        for entry in self.entries:
            average, place = self.averages[entry.megatron], entry.shard_of(self._groups)
            if entry.cut == VOCABULARY:
                average.copy_(state[PREFIX + entry.hf[0]])
                continue
            for name, part in zip(entry.hf, entry.cut.parts(average, entry.shapes, *place), strict=True):
                part.copy_(state[PREFIX + name].view(part.shape).clone())  # it may lie in the average itself
        if self.head is not None and self._has_own_head:
            self.head.copy_(state[HEAD])

    @property
    def _groups(self) -> Any:
        return self.teacher.layout.teacher.groups

    @property
    def _has_own_head(self) -> bool:
        """Whether the loss's output matrix is no weight of the teacher's own stages."""
        return all(self.head is not average for average in self.averages.values())

    @cached_property
    def alike(self) -> bool:
        """Whether every rank holds the same shards of both models. Collective, the first time."""
        ours = local_parameters(self.chunks)
        same = all(name in ours and ours[name].shape == weight.shape for name, weight in self.weights.items())
        agreed = torch.tensor(same, dtype=torch.int32, device=self.teacher.device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        return bool(agreed)

    def _student(self) -> Iterator[tuple[str, Tensor]]:
        """The student's weights in the teacher's cut, those of this rank's teacher, by megatron's names."""
        if self.alike:
            ours, lora = local_parameters(self.chunks), self.chunks[0].lora
            for name in self.averages:
                if (weight := merged(name, ours, lora)) is not None:  # it is there: they are alike
                    yield name, weight
            return
        entry_of = {name: entry for entry in self.entries for name in entry.hf}
        wholes: dict[str, Tensor] = {}
        for name, whole in self.resharder.stream():
            if (entry := entry_of.get(name)) is None:
                continue
            wholes[name] = whole
            if all(part in wholes for part in entry.hf):
                yield entry.megatron, _cut(entry, [wholes.pop(part) for part in entry.hf], self._groups)

    def _mix(self, average: Tensor, student: Tensor, teacher: Tensor) -> None:
        mixed = average.to(student.device)
        mixed.mul_(self.decay).add_(student.detach().float(), alpha=1 - self.decay)
        if mixed is not average:
            average.copy_(mixed)
        teacher.copy_(mixed)

    def _sharded(self, entry: Entry) -> Iterator[tuple[str, ShardedTensor]]:
        """An average's parts by Hugging Face tensor, which no layout changes. A vocabulary's keeps its padding."""
        average, groups, (index, count) = self.averages[entry.megatron], self._groups, entry.shard_of(self._groups)
        copies = groups.dp_cp if entry.expert is None else groups.expt_dp
        replica = (0, 0 if entry.cut.divided or entry.expert is not None else groups.tp.rank(), copies.rank())
        if entry.cut == VOCABULARY:
            key = PREFIX + entry.hf[0]
            yield key, _shard(key, average, 0, index, count, replica)
            return
        parts = entry.cut.parts(average, entry.shapes, index, count)
        for name, shape, part in zip(entry.hf, entry.shapes, parts, strict=True):
            whole = part.reshape(-1, *shape[1:]) if entry.cut.groups else part
            yield PREFIX + name, _shard(PREFIX + name, whole.contiguous(), entry.cut.dim, index, count, replica)


def _cut(entry: Entry, wholes: Sequence[Tensor], groups: Any) -> Tensor:
    """This rank's shard of a megatron parameter out of the whole tensors that it is made of."""
    index, count = entry.shard_of(groups)
    shard = wholes[0].new_zeros(entry.cut.shape(entry.shapes, count))
    parts = entry.cut.parts(shard, entry.shapes, index, count)
    for part, piece in zip(parts, entry.cut.slices(wholes, index, count), strict=True):
        part.copy_(piece)
    return shard


def _shard(key: str, part: Tensor, dim: int, index: int, count: int, replica: tuple[int, int, int]) -> ShardedTensor:
    """Shard `index` of `count` along `dim`, the first of its copies writes it. Padding at the end may differ."""
    return ShardedTensor.from_rank_offsets(
        key, part, (dim, index, count), replica_id=replica, allow_shape_mismatch=True
    )


def _host_copy(weight: Tensor) -> Tensor:
    """In fp32. Not pinned: a checkpoint is written by a forked child, which must see it as it was."""
    return weight.detach().to("cpu", torch.float32, copy=True)
