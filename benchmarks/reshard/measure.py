"""The ranks of `prune-opd bench reshard`: one student layout and one engine, measured from all sides.

    bare         the broadcasts that the collective stream cannot do without: its bytes, senders and buckets, but one
                 flat buffer per sender and bucket, nothing read from parameters or put in order, no checksum
    all-gather   the same bytes through flat all-gathers (tensor parallel students only), to compare with
    collective   the stream through collectives, its tensors dropped as they come
    shared       the stream through shared memory, the same
    reload       vLLM's reload from tensors that lie ready
    X + reload   vLLM's reload drawing from stream X: what a weight sync is

They take turns, round after round, each with a barrier before and after. `cpu_s` is this rank's CPU time, all threads.
Memory is the kernel's peak of resident memory (VmHWM) with buffers that are new: of a stream alone over what was
resident before, of a stream with the reload over the peak of the reload from ready tensors.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from benchmarks.common import answer, cpu_time, model_shape, peak_memory, reset_peak, rotated, write_model
from benchmarks.reshard.command import TRANSPORTS
from prune_opd import platform
from prune_opd.config import ParallelConfig, RolloutConfig

LAYOUTS = {"tp2": ParallelConfig(tensor=2), "pp2": ParallelConfig(tensor=1, pipeline=2)}


# ---------------------------------------------------------------------------------------------------- contenders


def drop(resharder: Any) -> None:
    for _ in resharder.stream():
        pass


def sync(resharder: Any, engine: Any) -> None:
    engine.load(resharder.stream())


class Bare:
    """Flat collectives of what a collective resharder moves, two buckets of buffers taking turns."""

    def __init__(self, resharder: Any):
        self.group = resharder.group
        self.ranks = dist.get_process_group_ranks(self.group)
        self.bytes_of = [self._bytes_by_sender(bucket) for bucket in resharder.buckets]
        largest = max(sum(sizes) for sizes in self.bytes_of)
        self.buffers = [torch.ones(largest, dtype=torch.uint8) for _ in range(2)]
        self.gathered_from = torch.ones(largest, dtype=torch.uint8)

    def _bytes_by_sender(self, bucket: Any) -> list[int]:
        sizes = [0] * len(self.ranks)
        for item in bucket.items:
            if not item.everywhere:
                total = sum(torch.Size(shape).numel() for shape in item.entry.shapes) * item.dtype.itemsize
                for owner in item.owners:
                    sizes[owner] += total // item.count
        return sizes

    @property
    def nbytes(self) -> int:
        return sum(map(sum, self.bytes_of))

    def broadcasts(self) -> None:
        for i, sizes in enumerate(self.bytes_of):
            parts = self.buffers[i % 2][: sum(sizes)].split(sizes)
            works = [
                dist.broadcast(part, src, group=self.group, async_op=True)
                for part, src in zip(parts, self.ranks, strict=True)
                if len(part)
            ]
            for work in works:
                work.wait()

    def all_gathers(self) -> None:
        for i, sizes in enumerate(self.bytes_of):
            part = max(sizes)
            dist.all_gather_into_tensor(
                self.buffers[i % 2][: part * len(sizes)], self.gathered_from[:part], group=self.group
            )


# ---------------------------------------------------------------------------------------------------- measuring


def timed(run: Callable[[], None]) -> dict[str, float]:
    gc.collect()
    dist.barrier()
    wall, cpu = time.perf_counter(), cpu_time()
    run()
    cpu = cpu_time() - cpu
    dist.barrier()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": cpu}


def peak(run: Callable[[], None]) -> tuple[int, int]:
    """Resident memory before `run` and at its peak [bytes]."""
    gc.collect()
    dist.barrier()
    before = reset_peak()
    run()
    highest = peak_memory()
    dist.barrier()
    return before, highest


@contextmanager
def stopwatch(*functions: tuple[Any, str]) -> Iterator[list[float]]:
    """Inside, the seconds of every call of these functions (owner, name) go to the list."""
    seconds: list[float] = []

    def watched(run: Callable[..., Any]) -> Callable[..., Any]:
        def timed_run(*args: Any) -> Any:
            start = time.perf_counter()
            result = run(*args)
            seconds.append(time.perf_counter() - start)
            return result

        return timed_run

    with ExitStack() as stack:
        for owner, name in functions:
            stack.enter_context(patch.object(owner, name, watched(getattr(owner, name))))
        yield seconds


def compare(chunks: list[Any], engine: Any, bucket_mb: float, rounds: int) -> dict[str, Any]:
    from prune_opd.weights import checksum
    from prune_opd.weights.checksum import Checksums
    from prune_opd.weights.stream import Resharder

    resharders = {name: Resharder(chunks, bucket_mb, name) for name in TRANSPORTS}
    bare = Bare(resharders["collective"])
    ready = {name: tensor.clone() for name, tensor in resharders["shared"].stream()}
    contenders: dict[str, Callable[[], None]] = {"bare": bare.broadcasts}
    if all(max(sizes) == min(sizes) for sizes in bare.bytes_of):
        contenders["all-gather"] = bare.all_gathers
    contenders["reload"] = lambda: engine.load(ready.items())
    for name, resharder in resharders.items():
        contenders[name] = partial(drop, resharder)
        contenders[f"{name} + reload"] = partial(sync, resharder, engine)
    for run in contenders.values():  # cold caches and first buffers
        run()

    times: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    checksum_share: dict[str, list[float]] = {name: [] for name in TRANSPORTS}
    for turn in range(rounds):
        for name in rotated(list(contenders), turn):
            with stopwatch((checksum, "bits_sum"), (Checksums, "compare")) as checking:
                result = timed(contenders[name])
            times[name].append(result)
            if name.endswith("+ reload"):
                checksum_share[name.split()[0]].append(sum(checking) / result["wall_s"])

    memory: dict[str, dict[str, list[int]]] = {
        name: {"stream_bytes": [], "sync_beyond_reload_bytes": []} for name in TRANSPORTS
    }
    for resharder in resharders.values():
        resharder.release()
    for _ in range(rounds):
        _, of_reload = peak(contenders["reload"])
        for name, resharder in resharders.items():
            before, highest = peak(contenders[name])
            resharder.release()
            memory[name]["stream_bytes"].append(highest - before)
            _, highest = peak(contenders[f"{name} + reload"])
            memory[name]["sync_beyond_reload_bytes"].append(highest - of_reload)
            resharder.release()
    return {
        "times": times,
        "checksum_share": checksum_share,
        "memory": memory,
        "moved_bytes": bare.nbytes,
        "model_bytes": sum(tensor.nbytes for tensor in ready.values()),
        "parameters": sum(tensor.numel() for tensor in ready.values()),
    }


def measure(
    folder: str, layout: str, rollout_tp: int, shape: Sequence[int], bucket_mb: float, rounds: int
) -> dict[str, Any]:
    """This rank's measurements. shape: layers, hidden size and vocabulary of the student, which stays in `folder`."""
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.model import build
    from prune_opd.rollout.engine import RolloutEngine

    layers, hidden, vocab = shape
    ranks, student = layouts.initialize(LAYOUTS[layout], machine, seed=0), Path(folder) / "student"
    if ranks.is_main and not student.exists():
        write_model(student, model_shape(layers, hidden), vocab)
    dist.barrier()
    chunks = build(student, ranks.student, torch.float32, trainable=False)
    rollout = RolloutConfig(tensor_parallel=rollout_tp, max_prompt_len=32, max_num_seqs=4, kv_cache_gb=0.05)
    engine = RolloutEngine(str(student), rollout, 32, torch.float32, machine)
    torch.set_num_threads(1)
    result = {**compare(chunks, engine, bucket_mb, rounds), "torch": torch.__version__}
    engine.close()
    return result


if __name__ == "__main__":
    answer(measure)
