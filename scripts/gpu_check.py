"""What one GPU says to the parts of this code that need little but torch, in a few minutes: `make gpu-check`.

Each step prints a figure, what was expected of it, and whether that holds. A step that fails does not keep the others
from running. Everything goes to gpu-check.json and, as a page to read, gpu-check.md. On a CPU the same steps run at the
size that is asked for; what only a GPU has says "not here". Exit code 1 if a step has failed.

    python scripts/gpu_check.py [--out DIR] [--small]

On a GPU it needs torch (with its Triton), numpy, psutil and annotated-types. On a CPU our own kernels are "not here"
unless TRITON_INTERPRET=1 has them interpreted. Left out, since they need megatron-core, Transformer Engine or vLLM:
training steps against the CPU's numbers, a checkpoint with a live CUDA context, an engine that sleeps and wakes.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prune_opd import platform
from prune_opd.config import ObjectiveConfig
from prune_opd.config.kernels import kernels_problem
from prune_opd.loss import Head, Method, Tokens, distill_loss
from prune_opd.megatron.offload import StorageMover

PACKAGES = ("megatron.core", "transformer_engine.pytorch", "fused_weight_gradient_mlp_cuda", "flashinfer", "vllm")
HOPPER = (9, 0)
WHOLE = ObjectiveConfig("full_vocab_reverse_kl")  # no rounding of a top-k decides its gradients
BY_KERNELS = ("topk_reverse_kl", "full_vocab_reverse_kl", "full_vocab_jsd")  # one of each kind
TURNS = 5


class Size(NamedTuple):
    tokens: int
    vocab: int
    hidden: int
    teacher_hidden: int
    chunk: int
    moved: int  # bytes


FULL = Size(2048, 151_936, 1536, 3584, 1024, 2 * 2**30)
SMALL = Size(48, 512, 32, 40, 16, 2**20)


@dataclass(frozen=True)
class Row:
    """passed: None where there is nothing to hold the figure against, or the machine has no such thing."""

    step: str
    what: str
    figure: str
    expected: str
    passed: bool | None
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        return "–" if self.passed is None else "passed" if self.passed else "FAILED"


Step = Callable[[platform.Platform, Size], Iterator[Row]]


def machine_step(machine: platform.Platform, size: Size) -> Iterator[Row]:
    """Which device, and which packages can be imported beside torch."""
    if machine.is_cpu:
        yield Row("machine", "device", "cpu", "a Hopper GPU", None)
    else:
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        yield Row("machine", "device", f"{name}, {capability}", f"capability {HOPPER}", capability >= HOPPER)
        free, total = torch.cuda.mem_get_info()
        yield Row("machine", "memory free", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB", "> 95 %", free > 0.95 * total)
    for package in PACKAGES:
        if importlib.util.find_spec(package.partition(".")[0]) is None:
            yield Row("machine", package, "not here", "", None)
            continue
        try:
            importlib.import_module(package)
            yield Row("machine", package, "imported", "imported", True)
        except Exception as error:
            yield Row("machine", package, f"{type(error).__name__}: {error}"[:200], "imported", False)


def product_step(machine: platform.Platform, size: Size) -> Iterator[Row]:
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


def loss_step(machine: platform.Platform, size: Size) -> Iterator[Row]:
    """Gradients of the fused loss against float64 of the same numbers, its time, its memory, and what it waits for."""
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        rows = {precision: _gradients(machine, size, dtype, precision) for precision in (dtype, torch.float64)}
        for which, name in enumerate(("hidden", "weight")):
            ours, exact = rows[dtype][which].double(), rows[torch.float64][which]
            error = float((ours - exact).norm() / exact.norm())
            yield Row("loss", f"{name} gradient, {dtype}", f"{error:.1e}", f"< {most:g}", error < most)
    inputs = _inputs(machine, size, torch.bfloat16, torch.bfloat16)
    machine.synchronize()
    machine.watch_memory()
    before, begin = machine.memory(), time.perf_counter()
    waits = _waits(machine, lambda: _backward(inputs, size, WHOLE))
    machine.synchronize()
    yield Row("loss", f"{size.tokens} tokens", f"{1e3 * (time.perf_counter() - begin):.1f} ms", "", None)
    if not machine.is_cpu:
        yield Row("loss", "peak beyond what was there", f"{(machine.memory() - before) / 1e9:.2f} GB", "", None)
        yield Row("loss", "waits for the device", str(waits), "", None)


def kernels_step(machine: platform.Platform, size: Size) -> Iterator[Row]:
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
        seconds = {of.kernels: _seconds(machine, size, of) for of in (ours, theirs)}
        figure = ", ".join(f"{kernels} {1e3 * taken:.1f} ms" for kernels, taken in seconds.items())
        faster = None if machine.is_cpu else seconds["triton"] < seconds["torch"]
        yield Row("kernels", f"{name}, {size.tokens} tokens in bf16", figure, "triton is faster", faster)


def mover_step(machine: platform.Platform, size: Size) -> Iterator[Row]:
    """Bytes that leave the device and come back: the same ones, and the device has them free in between."""
    tensor = torch.randn(size.moved // 4, device=machine.device)
    exact = tensor.clone()
    mover, there = StorageMover(lambda: [tensor], machine), machine.taken()
    begin = time.perf_counter()
    mover.offload()
    away = machine.taken()
    mover.restore()
    speed = 2 * size.moved / (time.perf_counter() - begin) / 1e9
    yield Row("mover", "bits", "equal" if torch.equal(tensor, exact) else "other", "equal", torch.equal(tensor, exact))
    yield Row("mover", "speed, the first time", f"{speed:.1f} GB/s", "", None)
    if there is not None and away is not None:
        share = (there - away) / size.moved
        yield Row("mover", "freed of what has left", f"{share:.0%}", "> 95 %", share > 0.95)


STEPS: dict[str, Step] = {
    "machine": machine_step,
    "product": product_step,
    "loss": loss_step,
    "kernels": kernels_step,
    "mover": mover_step,
}


def run(out: Path, size: Size, steps: dict[str, Step] = STEPS) -> list[Row]:
    """All steps in turn; the rows go to the console and to `out` as they come."""
    machine, rows = platform.prepare(), []
    out.mkdir(parents=True, exist_ok=True)
    for name, step in steps.items():
        begin = time.perf_counter()
        found = step(machine, size)
        while True:
            try:
                row = next(found)
            except StopIteration:
                break
            except Exception as error:
                traceback.print_exc()
                row = Row(name, "the step itself", f"{type(error).__name__}: {error}"[:200], "no error", False)
            rows.append(Row(**{**asdict(row), "seconds": round(time.perf_counter() - begin, 2)}))
            print(
                f"{row.verdict:7} {row.step}: {row.what}: {row.figure}" + (f" ({row.expected})" if row.expected else "")
            )
            _write(out, rows)
    return rows


def _write(out: Path, rows: list[Row]) -> None:
    (out / "gpu-check.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    lines = ["| step | what | figure | expected | |", "|---|---|---|---|---|"]
    lines += [f"| {row.step} | {row.what} | {row.figure} | {row.expected} | {row.verdict} |" for row in rows]
    (out / "gpu-check.md").write_text("\n".join(["# GPU check", "", *lines, ""]), encoding="utf-8")


def _random(size: Size, machine: platform.Platform, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(size.tokens, size.hidden, generator=draw)
    weight = 2 * torch.randn(size.vocab, size.hidden, generator=draw) / size.hidden**0.5
    return hidden.to(machine.device, dtype), weight.to(machine.device, dtype)


def _gradients(
    machine: platform.Platform,
    size: Size,
    dtype: torch.dtype,
    precision: torch.dtype,
    objective: ObjectiveConfig = WHOLE,
) -> tuple[Tensor, Tensor]:
    """Of the student's hidden states and output weight. dtype: of the inputs."""
    return _backward(_inputs(machine, size, dtype, precision), size, objective)


def _inputs(
    machine: platform.Platform, size: Size, dtype: torch.dtype, precision: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states and output weight of the student and of the teacher."""
    ours = [tensor.to(precision).requires_grad_() for tensor in _random(size, machine, dtype)]
    theirs = [t.to(precision) for t in _random(size._replace(hidden=size.teacher_hidden), machine, dtype)]
    return ours, theirs


def _backward(inputs: tuple[list[Tensor], list[Tensor]], size: Size, objective: ObjectiveConfig) -> Any:
    """The loss, and back: the student's gradients."""
    ours, theirs = inputs
    for tensor in ours:
        tensor.grad = None
    ids = torch.arange(size.tokens, device=ours[0].device) % size.vocab
    tokens = Tokens(ids, [0, size.tokens // 3, size.tokens], size.vocab)
    loss, _, _ = distill_loss(Head(*ours), Head(*theirs), tokens, Method(None, objective), chunk=size.chunk)
    loss.backward()
    return tuple(tensor.grad for tensor in ours)


def _seconds(machine: platform.Platform, size: Size, objective: ObjectiveConfig) -> float:
    """Of the loss in bf16, forward and backward: the least of some turns, after one that compiles."""
    inputs, taken = _inputs(machine, size, torch.bfloat16, torch.bfloat16), []
    for _ in range(1 if machine.is_cpu else 1 + TURNS):
        machine.synchronize()
        begin = time.perf_counter()
        _backward(inputs, size, objective)
        machine.synchronize()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def _waits(machine: platform.Platform, work: Callable[[], Any]) -> int:
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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check"))
    parser.add_argument("--small", action="store_true", help="a size that a CPU does in a second")
    given = parser.parse_args()
    rows = run(given.out, SMALL if given.small else FULL)
    failed = [row for row in rows if row.passed is False]
    print(f"{len(rows)} figures, {len(failed)} failed: {given.out / 'gpu-check.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
