"""Stand-ins of a rehearsal: a device without data, a job without other ranks, model directories without weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd import platform
from prune_opd.model_spec import ModelSpec, model_config
from prune_opd.platform import Platform

ENDS = {
    "student": 2,
    "teacher": 3,
}  # of a response, where a config.json does not say: different ones, as some pairs have


def prepare() -> Platform:
    """Make this process a rehearsal's, for good."""
    machine = platform.prepare_rehearsal()
    import prune_opd.weights.load as load

    load.SafetensorsDirectory = ShapesOnly  # type: ignore[misc, assignment]
    return machine


class ShapesOnly:
    """In place of `SafetensorsDirectory`: the tensors that a config.json asks for, without data."""

    def __init__(self, directory: str | Path):
        from prune_opd.weights.mapping import entries

        self.directory = Path(directory)
        spec = ModelSpec.read(directory)
        self._shape = {
            name: shape for entry in entries(spec) for name, shape in zip(entry.hf, entry.shapes, strict=True)
        }
        self.file_of = dict.fromkeys(self._shape, "model.safetensors")

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape[name]

    def read(self, name: str, dim: int, begin: int, end: int) -> Tensor:
        shape = list(self._shape[name])
        shape[dim] = end - begin
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def write_model(directory: Path, model_dir: str, role: str, layers: int | None) -> Path:
    """A model directory with nothing but a config.json: that of `model_dir`, of fewer layers if `layers` says so."""
    config = {"eos_token_id": ENDS[role], **model_config(role, model_dir)}
    if layers is not None:
        config["num_hidden_layers"] = min(layers, config["num_hidden_layers"])
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@contextmanager
def numbers_from_the_host() -> Iterator[None]:
    """Tensors that are made of numbers come by way of the host, as on a GPU: torch would forget the numbers on meta."""
    tensor, new_tensor, empty = torch.tensor, torch.Tensor.new_tensor, torch.empty

    def by_way_of_the_host(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        made = tensor(*args, **kwargs)
        there = torch.device("cpu" if device is None else device)
        return made if there.type == "cpu" else made.to(platform.META)

    def new(like: Tensor, data: Any, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any) -> Tensor:
        return by_way_of_the_host(data, dtype=dtype or like.dtype, device=device or like.device, **kwargs)

    def unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        return empty(*args, **kwargs)  # pinning asks for a GPU

    torch_module: Any = torch
    torch_module.tensor, torch_module.Tensor.new_tensor, torch_module.empty = by_way_of_the_host, new, unpinned
    try:
        yield
    finally:
        torch_module.tensor, torch_module.Tensor.new_tensor, torch_module.empty = tensor, new_tensor, empty


@contextmanager
def marks_of_parameters() -> Iterator[None]:
    """megatron-core marks parameters (of experts, cut over TP ranks), and a move to a GPU leaves the marks on them.

    A move to meta makes new parameters, without marks.
    """
    real = torch.nn.Module.to

    def to(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        marks = {name: dict(vars(parameter)) for name, parameter in module.named_parameters()}
        moved = real(module, *args, **kwargs)
        for name, parameter in moved.named_parameters():
            vars(parameter).update(marks[name])
        return moved

    module_type: Any = torch.nn.Module
    module_type.to = to
    try:
        yield
    finally:
        module_type.to = real


@contextmanager
def job(rank: int, world: int) -> Iterator[None]:
    """This process as one of `world` ranks that all do what it does; none of the others is there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    new_group, batch = dist.new_group, dist.batch_isend_irecv

    def without_network(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("backend", None)  # gloo, for what megatron-core moves on the host
        return new_group(ranks, *args, **kwargs)

    def one_after_the_other(p2p_op_list: list[dist.P2POp]) -> list[dist.Work]:
        """torch asks for the group's backend on the device, to send several messages as one."""
        works = [message.op(message.tensor, message.peer, message.group, message.tag) for message in p2p_op_list]
        return [work for work in works if work is not None]

    dist.new_group = dist.distributed_c10d.new_group = without_network
    dist.batch_isend_irecv = one_after_the_other
    try:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        yield
    finally:
        dist.new_group = dist.distributed_c10d.new_group = new_group
        dist.batch_isend_irecv = batch
        if dist.is_initialized():
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
