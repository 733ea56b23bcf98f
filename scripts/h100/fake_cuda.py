"""Student, teacher and loss of a recipe on CUDA tensors without data (torch's FakeTensorMode): forward.

Every operation is refused whose tensors lie on different devices, or that asks the device for a number. The loss
makes its gradients in the forward pass, so they are in it; the models' backward is not, since autograd asks for a CUDA
context (`prune-opd rehearse` has it, on `meta`). The layers are megatron-core's own: those of Transformer Engine begin
by asking for a device, and its kernels know no tensors without data. A tensor left on the host must be caught: it is
tried.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from prune_opd import platform
from prune_opd.method import packed
from prune_opd.platform import Platform

RECIPES = ("qwen3_8b_from_32b_32xh100_fp8", "r1_1_5b_from_r1_7b_8xh100")
LAYERS = 2
PROMPT, LENGTHS = 200, (900, 1300, 57)


def prepare() -> Platform:
    """CUDA's names answer with CUDA again, for tensors that need no driver."""
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    platform.prepare()
    platform.stand_in = torch.device("cuda", 0)
    cuda: Any = torch.cuda
    cuda.get_device_capability = lambda *args: platform.HOPPER
    tensor_type: Any = torch.Tensor
    tensor_type.type = torch.Tensor.type.__wrapped__  # type: ignore[attr-defined]  # it says torch.cuda.… by itself
    machine = Platform("cuda", platform.stand_in, "fake")
    platform.prepare = lambda: machine  # type: ignore[assignment]
    return machine


@contextmanager
def new_parameters() -> Iterator[None]:
    """A module that moves gets new parameters, with the marks that megatron-core made on the old ones: torch would swap
    tensors without data in place, and cannot where anything refers to them."""
    real = torch.nn.Module.to

    def to(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        new: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # by the old one, which two modules may share
        for part in module.modules():
            for name, old in part._parameters.items():
                if old is not None and old not in new:
                    new[old] = torch.nn.Parameter(old.detach().to(*args, **kwargs), old.requires_grad)
                    own = vars(new[old])  # what torch keeps there: the device, above all
                    own.update({mark: value for mark, value in vars(old).items() if mark not in own})
                part._parameters[name] = None if old is None else new[old]
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else buffer.to(*args, **kwargs)
        return module

    module_type: Any = torch.nn.Module
    module_type.to = to
    try:
        yield
    finally:
        module_type.to = real


def pieces_with_numbers(mode: FakeTensorMode) -> Callable[..., None]:
    """`Pieces` as it is, which looks where responses begin in tensors on the host; then on the device, without data."""
    real = packed.Pieces.__init__

    def init(self: packed.Pieces, cu_seqlens: Sequence[int], device: torch.device) -> None:
        with unset_fake_temporarily():
            real(self, cu_seqlens, "cpu")
        for name in ("length_B", "response_N", "start_N"):
            setattr(self, name, mode.from_tensor(getattr(self, name)).to(device))

    return init


def all_say_the_same(everyone: list[Any], mine: Any, group: Any = None) -> None:
    """In place of a gathering of objects, which go through tensors that have numbers."""
    everyone[:] = [mine] * len(everyone)


class Bounds(np.ndarray):
    """Segment bounds with their numbers, which tensors lose in here."""

    def diff(self) -> Any:
        return np.diff(self)


def with_numbers(batch: Any) -> Any:
    """A micro-batch whose bounds keep their numbers: the layers here, and the loss, read those on the host."""
    return replace(batch, cu_seqlens=batch.cu_seqlens.numpy().view(Bounds), cu_responses=batch.cu_responses.tolist())


def on_cuda(batch: Any, mode: FakeTensorMode) -> Any:
    """A micro-batch whose tensors are on CUDA."""

    def moved(tensor: Tensor) -> Tensor:
        return mode.from_tensor(tensor).to(platform.stand_in)

    return replace(
        batch,
        ids_N=moved(batch.ids_N),
        position_N=moved(batch.position_N),
        predicting_M=moved(batch.predicting_M),
        sampled_ids_M=moved(batch.sampled_ids_M),
    )


def forward(config: Any, machine: Platform, rank: int, world: int) -> list[str]:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    from prune_opd.loss.stats import BatchStats
    from prune_opd.loss.training_loss import gated_loss
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.packing import pack_rows
    from prune_opd.megatron.teacher import Teacher
    from prune_opd.megatron.trainer import Trainer
    from prune_opd.rehearse.machine import job

    said, mode = [], FakeTensorMode(allow_non_fake_inputs=True)
    rows = range(len(LENGTHS))
    prompts, responses = [[1] * PROMPT] * len(LENGTHS), [[1] * length for length in LENGTHS]
    with (
        job(rank, world),
        new_parameters(),
        mock.patch.object(dist, "all_gather_object", all_say_the_same),
        mock.patch.object(CudaRNGStatesTracker, "fork", lambda self, *name: nullcontext()),  # compares generators
        mock.patch("prune_opd.loss.stats.raise_if_broken", lambda *_: None),  # the one number that the loss waits for
        mock.patch.object(packed.Pieces, "__init__", pieces_with_numbers(mode)),
    ):
        layout = layouts.arrange(config.parallel, 0)
        host = torch.device("cpu")
        batches = {
            role: with_numbers(pack_rows(prompts, responses, rows, host, 128 * getattr(layout, role).tp))
            for role in ("student", "teacher")
        }
        with mode:
            trainer = Trainer(
                config.student, config.optimizer, config.parallel, 10, layout, torch.bfloat16, machine.device
            )
            teacher = Teacher(config.teacher, layout, torch.bfloat16, machine.device, 4096)
            said.append(where("parameters", [p for chunk in trainer.chunks for p in chunk.parameters()]))
            said.append(where("gradients", [p.main_grad for chunk in trainer.chunks for p in chunk.parameters()]))
            batch, theirs = (on_cuda(batches[role], mode) for role in ("student", "teacher"))
            with torch.no_grad():
                hidden = teacher.chunks[-1](theirs)[theirs.predicting_M]
            vocab = min(trainer.spec.vocab_size, teacher.spec.vocab_size)
            stats = BatchStats(len(LENGTHS), 8, max(LENGTHS), machine.device)
            answers = SimpleNamespace(packed=lambda rows: hidden)
            loss = gated_loss(config, teacher, answers, vocab, layout.student.tp_group, stats)
            student = trainer.ddp[0](batch)
            said.append(where("hidden states", [student, hidden]))
            total, tokens = loss(trainer.chunks[0], batch, student)
            assert tokens == sum(LENGTHS)
            said.append(where("the loss and its statistics", [total, stats.sums, stats.reliable_length_B]))
            hidden = hidden.cpu()
            try:
                loss(trainer.chunks[0], batch, student)
            except (RuntimeError, ValueError) as error:
                said.append(f"a tensor left on the host is refused: {str(error).splitlines()[0][:160]}")
            else:
                raise AssertionError("hidden states on the host went through")
    return said


def where(what: str, tensors: list[Tensor]) -> str:
    devices = {str(tensor.device) for tensor in tensors}
    assert devices == {str(platform.stand_in)}, f"{what} on {devices}"
    return f"{what}: {len(tensors)} tensors on {platform.stand_in}"


def main() -> None:
    warnings.simplefilter("ignore")
    machine = prepare()
    import prune_opd.weights.load as load
    from prune_opd.config.recipe import load_recipe
    from prune_opd.rehearse.machine import ShapesOnly, write_model

    class Shapes(ShapesOnly):
        def read(self, name: str, dim: int, begin: int, end: int) -> Tensor:
            return torch.empty(super().read(name, dim, begin, end).shape, dtype=torch.bfloat16)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(load, "SafetensorsDirectory", Shapes):
        for name in RECIPES:
            config = load_recipe(name)
            models = {
                role: str(write_model(Path(folder) / name / role, getattr(config, role), role, LAYERS))
                for role in ("student", "teacher")
            }
            config = replace(config, **models)
            world = config.planning.nodes * config.parallel.nproc
            for line in forward(config, machine, world - 1, world):
                print(f"{name}: {line}")


if __name__ == "__main__":
    main()
