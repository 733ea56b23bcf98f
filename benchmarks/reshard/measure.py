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
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import answer, cpu_time, peak_memory, reset_peak, rotated
from benchmarks.reshard.command import TRANSPORTS
from prune_opd import platform
from prune_opd.config import ParallelConfig, RolloutConfig
from prune_opd.data import ledger

LAYOUTS = {"tp2": ParallelConfig(tensor=2), "pp2": ParallelConfig(tensor=1, pipeline=2)}


def model_config(layers: int, hidden: int, vocab: int) -> dict[str, Any]:
    """A Qwen3 with tied embeddings, as config.json has it."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(2, hidden // 128),
        "head_dim": 64,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "bos_token_id": ledger.TOKEN_ID[ledger.BOS],
        "eos_token_id": ledger.TOKEN_ID[ledger.EOS],
    }


def write_student(folder: Path, config: dict[str, Any], seed: int = 0) -> None:
    """A directory with random weights."""
    from safetensors.torch import save_file

    from prune_opd.model_spec import ModelSpec
    from prune_opd.weights.mapping import entries

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    ledger.save_tokenizer(folder)
    spec = ModelSpec.read(folder)
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    shapes = {
        "embed_tokens": (spec.vocab_size, spec.hidden),
        "q_proj": (q, spec.hidden),
        "k_proj": (kv, spec.hidden),
        "v_proj": (kv, spec.hidden),
        "o_proj": (spec.hidden, q),
        "gate_proj": (spec.ffn, spec.hidden),
        "up_proj": (spec.ffn, spec.hidden),
        "down_proj": (spec.hidden, spec.ffn),
        "q_norm": (spec.head_dim,),
        "k_norm": (spec.head_dim,),
    }
    draw = torch.Generator().manual_seed(seed)
    names = (name for entry in entries(spec) for name in entry.hf)
    tensors = {
        name: torch.randn(shapes.get(name.split(".")[-2], (spec.hidden,)), generator=draw) * spec.hidden**-0.5
        for name in names
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


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
                total = sum(torch.Size(shape).numel() for shape in item.shapes) * item.dtype.itemsize
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


class Stopwatch:
    """Seconds spent in some functions of a module or methods of a class, while it is entered."""

    def __init__(self, cls: Any, methods: Sequence[str]):
        self.cls, self.originals, self.seconds = cls, {name: getattr(cls, name) for name in methods}, 0.0

    def __enter__(self) -> Stopwatch:
        for name, method in self.originals.items():
            setattr(self.cls, name, self._watched(method))
        return self

    def __exit__(self, *exc: object) -> None:
        for name, method in self.originals.items():
            setattr(self.cls, name, method)

    def _watched(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args)
            finally:
                self.seconds += time.perf_counter() - start

        return watched


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
            with Stopwatch(checksum, ("bits_sum",)) as sums, Stopwatch(Checksums, ("compare",)) as comparing:
                result = timed(contenders[name])
            times[name].append(result)
            if name.endswith("+ reload"):
                checksum_share[name.split()[0]].append((sums.seconds + comparing.seconds) / result["wall_s"])

    memory: dict[str, dict[str, list[int]]] = {
        name: {"stream_bytes": [], "sync_beyond_reload_bytes": [], "buffers": []} for name in TRANSPORTS
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
            memory[name]["buffers"].append(len(resharder._buffers))
            resharder.release()
    return {
        "times": times,
        "checksum_share": checksum_share,
        "memory": memory,
        "moved_bytes": bare.nbytes,
        "model_bytes": sum(tensor.nbytes for tensor in ready.values()),
        "parameters": sum(tensor.numel() for tensor in ready.values()),
        "buckets": {name: [bucket.nbytes for bucket in r.buckets] for name, r in resharders.items()},
    }


def measure(
    folder: str, layout: str, rollout_tp: int, shape: Sequence[int], bucket_mb: float, rounds: int
) -> dict[str, Any]:
    """This rank's measurements. shape: layers, hidden size and vocabulary of the student, which stays in `folder`."""
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.model import build
    from prune_opd.rollout.engine import RolloutEngine

    ranks, student = layouts.initialize(LAYOUTS[layout], machine, seed=0), Path(folder) / "student"
    if ranks.is_main and not student.exists():
        write_student(student, model_config(*shape))
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
