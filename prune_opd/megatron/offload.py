"""Moving tensors between the device and pinned host memory, under the tensors that everybody holds on to.

Parameters are views into DDP's buffers, master weights are known to the optimizer by identity: nobody may get new
tensors. So the storage under a tensor is emptied (`resize_(0)`) after its bytes are copied out, and filled again later;
every view of it is valid again then. Accessing one in between is an error. megatron-core does the same to its gradient
buffers. Its `optimizer.offload_to_cpu` instead gives parameters new data, which cuts fp32 parameters off their buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prune_opd.config import memory_phases as phases
from prune_opd.config.memory_phases import Handler, Transition
from prune_opd.platform import Platform

ENGINE_TAGS = {phases.ROLLOUT_WEIGHTS: "weights", phases.KV_CACHE: "kv_cache"}  # vLLM's names


class StorageMover:
    """Takes the storages under some tensors to the host and back; a `Handler` of config/memory_phases.py.

    tensors: asked each time they leave, since an optimizer makes its state at its first step. except_of: tensors whose
    storages stay, also where the former are views of them. The host buffers are kept, so that they are pinned once.
    """

    def __init__(
        self,
        tensors: Callable[[], Iterable[Tensor]],
        machine: Platform,
        except_of: Callable[[], Iterable[Tensor]] = tuple,
    ) -> None:
        self.tensors, self.except_of, self.machine = tensors, except_of, machine
        self._host: dict[int, Tensor] = {}
        self._away: list[tuple[torch.UntypedStorage, Tensor]] = []

    def __call__(self, transition: Transition) -> None:
        if transition.action == "away":
            self.offload()
        else:
            self.restore()

    def offload(self) -> None:
        """Copy the storages to the host and free them on the device."""
        staying = _storages(self.except_of()).keys()
        leaving = {key: storage for key, storage in self._on_device().items() if key not in staying}
        away = {storage._cdata: self._host[storage._cdata] for storage, _ in self._away}
        self._host = away | {
            key: self._host[key] if key in self._host else self._pinned(storage) for key, storage in leaving.items()
        }
        for key, storage in leaving.items():
            self._host[key].copy_(_bytes(storage), non_blocking=True)
        self.machine.synchronize()  # the copies must be over before their source is freed
        for key, storage in leaving.items():
            self._away.append((storage, self._host[key]))
            storage.resize_(0)
        torch.cuda.empty_cache()  # vLLM does not allocate through torch's cache

    def restore(self) -> None:
        """Allocate the storages again and copy their bytes back."""
        for storage, host in self._away:
            storage.resize_(host.numel())
            _bytes(storage).copy_(host, non_blocking=True)
        self._away.clear()
        self.machine.synchronize()  # whatever stream uses them next

    def _pinned(self, storage: torch.UntypedStorage) -> Tensor:
        return torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=not self.machine.is_cpu)

    def _on_device(self) -> dict[int, torch.UntypedStorage]:
        here = (tensor for tensor in self.tensors() if tensor.device.type == self.machine.device.type)
        return {key: storage for key, storage in _storages(here).items() if storage.nbytes() > 0}


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    return {storage._cdata: storage for tensor in tensors for storage in [tensor.untyped_storage()]}


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def optimizer_tensors(optimizer: Any) -> Iterator[Tensor]:
    """What megatron-core's optimizer steps on (fp32 masters, or the model's own fp32 parameters) and Adam's moments."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def handlers(trainer: Any, teacher: Any, engine: Callable[[], Any], machine: Platform) -> dict[str, Handler]:
    """What carries out the transitions of config/memory_phases.py in a run on a GPU. engine: built later than these.

    teacher: one, or `Teachers`, each of which has a part of its own and shares that of the heads.
    """
    teachers = getattr(teacher, "of", {"": teacher})

    def heads() -> list[Tensor]:
        return [head for one in teachers.values() for head in _head(one)]

    def gradients(transition: Transition) -> None:
        for chunk in trainer.ddp:
            chunk.offload_grad_buffers() if transition.action == "away" else chunk.restore_grad_buffers()

    def rollout(transition: Transition) -> None:
        if transition.action == "sleep":
            engine().sleep()
        else:
            engine().wake_up([ENGINE_TAGS[part] for part in transition.parts])

    student = partial(_weights, trainer)
    return {
        phases.STUDENT: StorageMover(student, machine),
        phases.GRADIENTS: gradients,
        phases.OPTIMIZER: StorageMover(lambda: optimizer_tensors(trainer.optimizer), machine, except_of=student),
        **{phases.part_of(name): teacher_mover(one, machine) for name, one in teachers.items()},
        phases.TEACHER_HEAD: StorageMover(heads, machine),
        phases.ROLLOUT_WEIGHTS: rollout,
    }


def teacher_mover(teacher: Any, machine: Platform) -> StorageMover:
    """Moves a teacher's layers; its head stays, where the layers have it as their embedding too."""
    return StorageMover(partial(_weights, teacher), machine, except_of=partial(_head, teacher))


def _weights(model: Any) -> list[Tensor]:
    return [parameter for chunk in model.chunks for parameter in chunk.parameters()]


def _head(teacher: Any) -> list[Tensor]:
    return [teacher.head_weight] if teacher.layout.student.is_last_stage else []
