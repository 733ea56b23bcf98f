"""Which machine this is, and the one place that makes megatron-core and vLLM run on it.

On CUDA nothing is changed. Without CUDA the same, unmodified megatron-core runs on gloo: it asks torch for
`torch.cuda.current_device()`, `device="cuda"`, `.cuda()` and a CUDA generator, and compares `tensor.type()` with
`"torch.cuda.FloatTensor"`; those names answer for the CPU once `prepare()` has run. It must run before any `megatron`
import, because megatron-core binds `torch.compile` when it is imported. vLLM's CPU build runs as it is, but for the
three corrections at the end of this file.

What the CPU cannot do is refused (`check/run.py`, `megatron/model.py`), never ignored.
"""

from __future__ import annotations

import functools
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.utils._device

# What CUDA's names answer with where there is no GPU: the CPU, and in a rehearsal tensors without data.
stand_in = torch.device("cpu")
META = torch.device("meta")
HOPPER = (9, 0)  # what a rehearsal's GPU is capable of
FACTORIES = (
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "rand",
    "randn",
    "randint",
    "zeros_like",
    "empty_like",
)
# fmt: off
NAMES = (str, torch.device)  # types that name a device
NO_OPS = ("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats")
MEMORY = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
# fmt: on
# What megatron-core and vLLM say on every CPU start: known, wanted, and in the way of what a user should read.
EXPECTED_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "When using async grad allreduce",
    "`torch.distributed.reduce_op` is deprecated",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
    "`torch.distributed.all_gather_into_tensor` is deprecated",
    "Please use DTensor instead",
    "`load_state_dict` is deprecated",
)


@dataclass(frozen=True)
class Platform:
    name: str  # cpu | cuda | meta
    device: torch.device
    backend: str  # of torch.distributed

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"

    def synchronize(self) -> None:
        """Wait for queued device work, so that a phase's time is its own."""
        if not self.is_cpu:
            torch.cuda.synchronize()

    def gpu_names(self) -> list[str]:
        """Of this host's GPUs; empty on the CPU."""
        return [] if self.is_cpu else [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]

    def watch_memory(self) -> None:
        """From here on `memory` looks for the peak."""
        if not self.is_cpu:
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> int:
        """Peak of the device's memory that this process took since `watch_memory`; CPU: what is resident now [bytes].

        The kernel keeps one peak a process, which is the benchmarks' to reset: the CPU has no second one for phases.
        """
        return psutil.Process().memory_info().rss if self.is_cpu else torch.cuda.max_memory_allocated()

    def taken(self) -> int | None:
        """Bytes of the device that are in use now, whoever uses them; None on a CPU.

        `memory` does not see what vLLM's own allocator maps, nor CUDA's context and NCCL's buffers.
        """
        if self.is_cpu:
            return None
        free, total = self.device_memory()
        return total - free

    def device_memory(self) -> tuple[int, int]:
        """Bytes of a GPU that are free, and all of them."""
        free, total = torch.cuda.mem_get_info()
        return int(free), int(total)


def prepare() -> Platform:
    """Make this process ready for megatron-core; call it before any `megatron` import. Safe to call again."""
    machine = _prepare()
    return machine if stand_in != META else Platform("meta", META, "fake")


def prepare_rehearsal() -> Platform:
    """`prepare` for a rehearsal (rehearse/): tensors without data take the place of a GPU's, for good."""
    global stand_in
    _prepare()
    stand_in = META
    tensor_type: Any = torch.Tensor
    tensor_type.is_cuda = property(lambda tensor: tensor.device == META)
    tensor_type.record_stream = lambda tensor, stream: None
    cuda: Any = torch.cuda
    cuda.get_device_capability = lambda *args: HOPPER
    return prepare()


@functools.cache
def _prepare() -> Platform:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    # cuBLAS may split a product over a whole vocabulary in parts and add those up in bf16, unless it is told not to.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        import_megatron()
        return Platform("cuda", torch.device("cuda", local_rank), "nccl")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # megatron-core's jit_fuser is torch.compile
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    _answer_cuda_names()
    return Platform("cpu", stand_in, "gloo")


def import_megatron() -> Any:
    """Its generators' module; without wandb, which its inference part imports: a twentieth of a rank's start."""
    hidden = sys.modules.setdefault("wandb", None) is None  # type: ignore[arg-type]  # None: an ImportError there
    try:
        import megatron.core.tensor_parallel.random as megatron_random
    finally:
        if hidden:
            del sys.modules["wandb"]
    return megatron_random


def prepare_experts() -> None:
    """What a model with experts needs on top; imports more of megatron-core, so only such a model asks for it."""
    machine = prepare()
    if machine.name == "cuda":
        return
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    modules: Any = (moe_utils, token_dispatcher)
    # It makes numbers of tokens numpy arrays on their way from a GPU, and needs them as such.
    for module in modules if machine.is_cpu else ():
        module.maybe_move_tensor_to_cpu = _as_numpy_if_asked
    if not hasattr(moe_utils, "te_general_gemm"):  # asked for, but not defined, without Transformer Engine
        modules[0].te_general_gemm = None


@functools.cache
def prepare_vllm() -> None:
    """What vLLM needs on the CPU before its first engine is built. Safe to call again."""
    if not prepare().is_cpu:
        return
    import vllm.v1.sample.sampler  # noqa: F401  before `compiling`, which is for the model alone

    _own_shared_memory()


def reload_weights(llm: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Replace the weights of vLLM's `llm` by (Hugging Face name, whole tensor), drawn to the end on every rank."""
    on_cpu = prepare().is_cpu
    if on_cpu:
        llm.collective_rpc(_unpack_experts)
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
    if on_cpu:
        llm.collective_rpc(_repack_tied_head)


@contextmanager
def compiling() -> Iterator[None]:
    """What calls torch.compile in here gets a compiled function, whenever that first runs.

    `prepare` switches it off on the CPU, for megatron-core's fusions; torch looks at the switch in that call only.
    """
    switched_off = os.environ.pop("TORCHDYNAMO_DISABLE", None)
    try:
        yield
    finally:
        if switched_off is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = switched_off


@contextmanager
def untouched_rng() -> Iterator[None]:
    """Restore the Python, numpy and torch generators afterwards: vLLM reseeds and draws from the global ones."""
    state = rng_state()
    try:
        yield
    finally:
        load_rng_state(state)


def rng_state() -> dict[str, Any]:
    """This process's generators as JSON values: that is how they go into a checkpoint."""
    version, numbers, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}},
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def load_rng_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(_byte_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_byte_tensor(state["cuda"]))


def _byte_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


# ------------------------------------------------------------------------------------- the CPU answers for the GPU


class _InOrder(nullcontext[None]):
    """Stand-in for a CUDA stream or event: CPU work is in program order already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def record_event(self, *args: Any) -> _InOrder:
        return self

    def query(self) -> bool:
        return True

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    synchronize = wait = wait_event = wait_stream = record = _nothing


class _TypeName(str):
    """A type's name that also equals its CUDA twin: megatron's optimizer checks parameters by `type()`."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str.__eq__(self, other.replace("torch.cuda.", "torch."))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _answer_cuda_names() -> None:
    cuda: Any = torch.cuda
    stream = _InOrder()
    cuda.current_device = lambda: stand_in
    cuda.Stream = cuda.Event = _InOrder
    cuda.stream = lambda stream_=None: stream
    cuda.current_stream = cuda.default_stream = lambda *args: stream
    for name in NO_OPS:
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in MEMORY:
        setattr(cuda, name, lambda *args, **kwargs: 0)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None

    # `with torch.device("meta")` (transformers loads models in it) knows the factories by identity, looked up once: it
    # must know the real ones, or models loaded later in this process would get uninitialised buffers.
    torch.utils._device._device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_stand_in(getattr(torch, name)))
    tensor_type: Any = torch.Tensor
    tensor_type.to = _on_stand_in(torch.Tensor.to)
    tensor_type.cuda = lambda self, *args, **kwargs: self.to(stand_in)
    module_type: Any = torch.nn.Module
    module_type.cuda = lambda self, *args, **kwargs: self.to(stand_in)
    tensor_type.type = _type_name(torch.Tensor.type)
    _cpu_generator_for_the_cuda_generator()


def _on_stand_in(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` (a factory, or `Tensor.to`) with the stand-in as its device where CUDA is asked for; quick."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = stand_in
            kwargs.pop("pin_memory", None)
        for arg in args:
            if type(arg) in NAMES and _is_cuda(arg):
                args = tuple(stand_in if _is_cuda(arg) else arg for arg in args)
                break
        return function(*args, **kwargs)

    return call


def _type_name(type_: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(type_)
    def name_or_cast(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = type_(self, *args, **kwargs)
        return _TypeName(result.replace("torch.meta.", "torch.")) if isinstance(result, str) else result

    return name_or_cast


def _as_numpy_if_asked(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.detach().numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _cpu_generator_for_the_cuda_generator() -> None:
    cuda: Any = torch.cuda
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    megatron_random = import_megatron()
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


# ----------------------------------------------------------------------------------------------------- vLLM on the CPU


def _own_shared_memory() -> None:
    """Name the shared memory of an engine's ranks after this run.

    vLLM's CPU path names it after the ranks alone, so two runs on a machine would meet in it, and what a killed run
    leaves behind would end the next one: a name is not created twice.
    """
    from vllm.distributed.device_communicators import cpu_communicator

    theirs = cpu_communicator._CPUSHMDistributed

    class OfThisRun(theirs):  # type: ignore[misc, valid-type]
        @staticmethod
        def make_group_name(communicator: Any) -> str:
            run = f"prune-opd-{os.environ['MASTER_PORT']}"  # one run a port; a rank that is alone (0) shares no memory
            return run + theirs.make_group_name(communicator).replace("/", "")

        def _init_cpu_shm(self) -> int:
            # Before the ranks meet: each one's own segment, which a run with this port has left when it was killed.
            Path("/dev/shm", f"{self.group_name}_{self.communicator.rank}").unlink(missing_ok=True)
            return int(super()._init_cpu_shm())

    cpu_communicator._CPUSHMDistributed = OfThisRun


def _unpack_experts(worker: Any) -> None:
    """vLLM's CPU path packs experts only while it has no kernel for them: a reload would leave them unpacked.

    Without its kernel each layer builds one anew as it is reloaded, and packs.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    for module in worker.model_runner.get_model().modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod):
            method.moe_kernel = None


def _repack_tied_head(worker: Any) -> None:
    """vLLM's CPU path keeps a packed copy of the output matrix, which a reload leaves stale when it is tied."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in worker.model_runner.get_model().modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear") and module.weight.numel():
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
