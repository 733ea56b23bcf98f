"""The loss on a GPU: its products, its gradients, its ties, its time and memory beside other forms of it."""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prune_opd.config import GateConfig, ObjectiveConfig
from prune_opd.config.kernels import kernels_problem
from prune_opd.loss import Head, Method, Tokens, distill_loss
from prune_opd.platform import Platform
from scripts.gpu.rows import Row, Size

WHOLE = ObjectiveConfig("full_vocab_reverse_kl")  # no rounding of a top-k decides its gradients
BY_KERNELS = ("topk_reverse_kl", "full_vocab_reverse_kl", "full_vocab_jsd")  # one of each kind
RIVALS = {"trl": "trl", "liger": "liger_kernel"}  # contender of benchmarks/loss → the package that it needs
TURNS = 5


def product_step(machine: Platform, size: Size) -> Iterator[Row]:
    """A product of bf16 matrices that comes out in fp32 without being rounded on the way."""
    a, b = _random(size, machine, torch.bfloat16)
    exact = a.double() @ b.double().t()
    expected = "< 1e-5 of the largest"
    try:
        product = torch.mm(a, b.t(), out_dtype=torch.float32)
    except (TypeError, RuntimeError) as error:
        here = None if machine.is_cpu else False
        yield Row("product", "bf16 → fp32", f"not here ({str(error).partition(chr(10))[0][:80]})", expected, here)
        return
    error_of = float((product.double() - exact).abs().max() / exact.abs().max())
    yield Row("product", "bf16 → fp32", f"{error_of:.1e}", expected, error_of < 1e-5)
    seconds = {
        "into fp32": _least(machine, lambda: torch.mm(a, b.t(), out_dtype=torch.float32)),
        "bf16, then a copy": _least(machine, lambda: (a @ b.t()).float()),
    }
    figure = ", ".join(f"{name} {1e3 * taken:.2f} ms" for name, taken in seconds.items())
    faster = None if machine.is_cpu else seconds["into fp32"] < seconds["bf16, then a copy"]
    yield Row("product", f"{len(a)} × {len(b)}", figure, "into fp32 is faster", faster)


def loss_step(machine: Platform, size: Size) -> Iterator[Row]:
    """Gradients of the fused loss against float64 of the same numbers, its time, its memory, and what it waits for."""
    for student, teacher, columns in size.pairs:
        shape = size._replace(hidden=student, teacher_hidden=teacher, vocab=columns)
        for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
            rows = {precision: _gradients(machine, shape, dtype, precision) for precision in (dtype, torch.float64)}
            for which, name in enumerate(("hidden", "weight")):
                ours, exact = rows[dtype][which].double(), rows[torch.float64][which]
                error = float((ours - exact).norm() / exact.norm())
                what = f"{name} gradient, {dtype}, H {student}/{teacher}, V {columns}"
                yield Row("loss", what, f"{error:.1e}", f"< {most:g}", error < most)
    inputs = _inputs(machine, size, torch.bfloat16, torch.bfloat16)
    _backward(inputs, size, WHOLE)  # allocations and kernels that the first call alone pays for
    chunks = (size.tokens, size.chunk)
    waits = [_waits(machine, partial(_backward, inputs, size._replace(chunk=chunk), WHOLE)) for chunk in chunks]
    if not machine.is_cpu:  # one is known: whether the logits are finite
        figure = f"{waits[0]} in one chunk, {waits[1]} in {size.tokens // size.chunk}"
        yield Row("loss", "waits for the device", figure, "as many", waits[0] == waits[1])


def kernels_step(machine: Platform, size: Size) -> Iterator[Row]:
    """The loss by our own kernels (objective.kernels=triton) beside torch's: gradients, and the time of both."""
    if problem := kernels_problem("triton", not machine.is_cpu):
        yield Row("kernels", "triton", f"not here ({problem.partition(':')[0]})", "the gradients of torch's", None)
        return
    for name in BY_KERNELS:
        ours, theirs = (ObjectiveConfig(name, kernels=kernels) for kernels in ("triton", "torch"))
        for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
            pairs = zip(*(_gradients(machine, size, dtype, dtype, of) for of in (ours, theirs)), strict=True)
            error = max(float((one.double() - other.double()).norm() / other.double().norm()) for one, other in pairs)
            yield Row("kernels", f"{name}, {dtype}", f"{error:.1e} from torch's", f"< {most:g}", error < most)
        inputs = _inputs(machine, size, torch.bfloat16, torch.bfloat16)
        seconds = {of.kernels: _least(machine, partial(_backward, inputs, size, of)) for of in (ours, theirs)}
        figure = ", ".join(f"{kernels} {1e3 * taken:.1f} ms" for kernels, taken in seconds.items())
        faster = None if machine.is_cpu else seconds["triton"] < seconds["torch"]
        yield Row("kernels", f"{name}, {size.tokens} tokens in bf16", figure, "triton is faster", faster)


def ties_step(machine: Platform, size: Size) -> Iterator[Row]:
    """Rows whose logits are all equal: the student's top k are then the lowest ids, and cost no more than others."""
    gate, times = GateConfig(k=4), {}
    for tied in size.tied:
        ours, theirs = _inputs(machine, size, torch.float32, torch.float32)
        with torch.no_grad():
            ours[0][:tied] = 0
            theirs[1][: 2 * gate.k] *= 8  # the teacher has some of the lowest ids among its best
            lowest = (theirs[0][:tied] @ theirs[1].t()).topk(gate.k, dim=-1).indices < gate.k
            expected = lowest.double().mean(-1)

        def call(ours: list[Tensor] = ours, theirs: list[Tensor] = theirs) -> Any:
            return _loss((ours, theirs), size, Method(gate, ObjectiveConfig(k=gate.k)))[2]

        overlap = call().overlap_N[:tied].double()
        times[tied] = _least(machine, call)
        if tied:
            right = int((overlap == expected).sum())
            yield Row("ties", f"{tied} rows of equal logits", f"{right} right", "all of them", right == tied)
    figure = ", ".join(f"{tied}: {1e3 * taken:.1f} ms" for tied, taken in times.items())
    held = None if machine.is_cpu else max(times.values()) < 1.2 * times[size.tied[0]]
    yield Row("ties", "time by rows of equal logits", figure, "within 20 %", held)


def sizes_step(machine: Platform, size: Size) -> Iterator[Row]:
    """Time, peak and waits of the loss in bf16 by shape and chunk, beside bare products, full logits and others'."""
    from benchmarks.loss import measure

    for student, teacher, columns in size.pairs:
        plain = size.tokens // 4 * 4
        for name, chunk in [("ours", chunk) for chunk in size.chunks] + [
            (name, size.chunk) for name in ("ours_full", "floor", "naive", *RIVALS)
        ]:
            what = f"{name}, H {student}/{teacher}, V {columns}" + (f", chunk {chunk}" if name == "ours" else "")
            if (package := RIVALS.get(name)) and importlib.util.find_spec(package) is None:
                yield Row("sizes", what, f"not here (no {package})", "", None)
                continue
            inputs = measure.make_inputs(plain, columns, (student, teacher), min(chunk, plain), torch.bfloat16)
            inputs = inputs._replace(
                **{
                    field: value.detach().to(machine.device).requires_grad_(value.requires_grad)
                    for field, value in inputs._asdict().items()
                    if isinstance(value, Tensor)
                }
            )
            contender = measure.CONTENDERS[name]

            def call(contender: Any = contender, inputs: Any = inputs) -> None:
                measure._forget_gradients(inputs, True)
                contender(inputs)

            try:
                figure = _figure(machine, call)
            except torch.OutOfMemoryError:
                figure = "does not fit"
            yield Row("sizes", what, figure, "", None)


def _figure(machine: Platform, call: Callable[[], Any]) -> str:
    seconds = _least(machine, call)
    if machine.is_cpu:
        return f"{1e3 * seconds:.1f} ms"
    machine.watch_memory()
    before = torch.cuda.memory_allocated()
    waits = _waits(machine, call)
    machine.synchronize()
    return f"{1e3 * seconds:.1f} ms, {(machine.memory() - before) / 1e9:.2f} GB more at its peak, {waits} waits"


def _random(size: Size, machine: Platform, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(size.tokens, size.hidden, generator=draw)
    weight = 2 * torch.randn(size.vocab, size.hidden, generator=draw) / size.hidden**0.5
    return hidden.to(machine.device, dtype), weight.to(machine.device, dtype)


def _gradients(
    machine: Platform,
    size: Size,
    dtype: torch.dtype,
    precision: torch.dtype,
    objective: ObjectiveConfig = WHOLE,
) -> tuple[Tensor, Tensor]:
    """Of the student's hidden states and output weight. dtype: of the inputs."""
    return _backward(_inputs(machine, size, dtype, precision), size, objective)


def _inputs(
    machine: Platform, size: Size, dtype: torch.dtype, precision: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states and output weight of the student and of the teacher."""
    ours = [tensor.to(precision).requires_grad_() for tensor in _random(size, machine, dtype)]
    theirs = [t.to(precision) for t in _random(size._replace(hidden=size.teacher_hidden), machine, dtype)]
    return ours, theirs


def _loss(inputs: tuple[list[Tensor], list[Tensor]], size: Size, method: Method) -> Any:
    ours, theirs = inputs
    for tensor in ours:
        tensor.grad = None
    ids = torch.arange(size.tokens, device=ours[0].device) % size.vocab
    tokens = Tokens(ids, [0, size.tokens // 3, size.tokens], size.vocab)
    return distill_loss(Head(*ours), Head(*theirs), tokens, method, chunk=size.chunk)


def _backward(inputs: tuple[list[Tensor], list[Tensor]], size: Size, objective: ObjectiveConfig) -> Any:
    """The loss, and back: the student's gradients."""
    loss, _, _ = _loss(inputs, size, Method(None, objective))
    loss.backward()
    return tuple(tensor.grad for tensor in inputs[0])


def _least(machine: Platform, call: Callable[[], Any]) -> float:
    """Seconds: the least of some turns, after one that compiles. On a CPU, where they mean little, of one."""
    taken = []
    for _ in range(1 if machine.is_cpu else 1 + TURNS):
        machine.synchronize()
        begin = time.perf_counter()
        call()
        machine.synchronize()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def _waits(machine: Platform, work: Callable[[], Any]) -> int:
    """How often `work` waits for the device."""
    if machine.is_cpu:
        work()
        return 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in said)
