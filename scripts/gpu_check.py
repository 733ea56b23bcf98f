"""What one GPU says to this code, in some ten minutes: `make gpu-check`.

Each step prints a figure, what was expected of it, and whether that holds. A step that fails does not keep the others
from running. Everything goes to gpu-check.json and, as a page to read, gpu-check.md. On a CPU the same steps run at the
size that is asked for; what only a GPU has says "not here". Exit code 1 if a step has failed.

    python scripts/gpu_check.py [--out DIR] [--small] [--steps NAME …]

It takes what is there. With the image's packages all of it runs. On a machine that has torch (2.11 or later, with its
Triton) and numpy alone, the folder that `make gpu-check-folder` makes brings the rest: megatron-core and a few small
wheels, but neither vLLM nor Transformer Engine, whose figures are then "not here". scripts/gpu/ has the steps. The
page ends with the seconds of each, beside what was reckoned.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from prune_opd import platform
from prune_opd.megatron.offload import StorageMover
from scripts.gpu.engine import engine_step
from scripts.gpu.loss import kernels_step, loss_step, product_step, sizes_step, ties_step
from scripts.gpu.reload import experts_step, reload_step
from scripts.gpu.rows import FULL, SMALL, Row, Size, Step
from scripts.gpu.training import checkpoint_step, memory_step, steps_step, trouble_step
from scripts.gpu.variants import variants_step

PACKAGES = ("megatron.core", "transformer_engine.pytorch", "fused_weight_gradient_mlp_cuda", "flashinfer", "vllm")
HOPPER = (9, 0)


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


def mover_step(machine: platform.Platform, size: Size) -> Iterator[Row]:
    """Bytes that leave the device and come back: the same ones, and the device has them free in between."""
    tensor = torch.randn(size.moved // 4, device=machine.device)
    exact = tensor.clone()
    pinned = _pinned(machine)
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
        times = (_pinned(machine) - pinned) / size.moved
        yield Row("mover", "pinned for what has left", f"{times:.2f} times as much", "at most twice", times <= 2)


def _pinned(machine: platform.Platform) -> int:
    """Bytes of the host that torch has pinned."""
    return 0 if machine.is_cpu else int(torch.cuda.host_memory_stats()["allocated_bytes.current"])


STEPS: dict[str, Step] = {
    "machine": machine_step,
    "product": product_step,
    "loss": loss_step,
    "ties": ties_step,
    "kernels": kernels_step,
    "variants": variants_step,
    "sizes": sizes_step,
    "mover": mover_step,
    "steps": steps_step,
    "trouble": trouble_step,
    "checkpoint": checkpoint_step,
    "memory": memory_step,
    "engine": engine_step,
    "experts": experts_step,
    "reload": reload_step,
}
# Seconds of each on a Hopper with all packages: reckoned, not measured. Ten minutes in all.
# fmt: off
ESTIMATED = {
    "machine": 15, "product": 5, "loss": 20, "ties": 10, "kernels": 40, "variants": 45, "sizes": 55, "mover": 5,
    "steps": 35, "trouble": 5, "checkpoint": 10, "memory": 20, "engine": 180, "experts": 75, "reload": 80,
}
# fmt: on


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
        if not machine.is_cpu:  # the engines' processes find the device as this one found it
            torch.cuda.empty_cache()
    return rows


def _write(out: Path, rows: list[Row]) -> None:
    (out / "gpu-check.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    lines = ["| step | what | figure | expected | |", "|---|---|---|---|---|"]
    lines += [f"| {row.step} | {row.what} | {row.figure} | {row.expected} | {row.verdict} |" for row in rows]
    lines += ["", "## Seconds of each step", "", "| step | estimated on a Hopper | here |", "|---|--:|--:|"]
    taken = {row.step: row.seconds for row in rows}  # up to its last row
    lines += [f"| {step} | {ESTIMATED.get(step, '')} | {seconds:.0f} |" for step, seconds in taken.items()]
    lines.append(f"| together | {sum(ESTIMATED.get(step, 0) for step in taken)} | {sum(taken.values()):.0f} |")
    (out / "gpu-check.md").write_text("\n".join(["# GPU check", "", *lines, ""]), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check"))
    parser.add_argument("--small", action="store_true", help="a size that a CPU does in a second")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="NAME", help=", ".join(STEPS))
    given = parser.parse_args()
    rows = run(given.out, SMALL if given.small else FULL, {name: STEPS[name] for name in given.steps})
    failed = [row for row in rows if row.passed is False]
    print(f"{len(rows)} figures, {len(failed)} failed: {given.out / 'gpu-check.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
