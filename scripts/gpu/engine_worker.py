"""A process with one engine of vLLM, whose weights are made on the spot: the work of scripts/gpu/reload.py.

    python -m scripts.gpu.engine_worker loaded|fresh FOLDER      FOLDER/job.json has the fields of `Job`

loaded: writes drawn weights to FOLDER/start, builds trainer and engine of them, and `ROUNDS` times draws others for the
trainer, puts the engine to sleep (on a GPU), overwrites what is free, wakes the engine and syncs. In the end the
trainer's weights are exported to FOLDER/exported.
fresh: builds an engine of FOLDER/exported.

Both then generate the same rows and write FOLDER/loaded.json or FOLDER/fresh.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from prune_opd import platform
from prune_opd.config import HorizonConfig, MemoryConfig, ParallelConfig, PrecisionConfig, RolloutConfig, TrainConfig
from prune_opd.data.prompt import Prompt
from prune_opd.platform import Platform

ROUNDS = 3
PROMPT_TOKENS, PROMPTS, TOKENS = (5, 40, 1, 170), 16, 32  # lengths of the prompts, how many there are, and of responses
FILE_BYTES = 5 * 2**30
SPOILED = 0.9  # of what is free on the device while the engine sleeps


@dataclass(frozen=True)
class Job:
    """shape: a config.json. params, quantization, bucket_mb, compiled: of a run. compiled: None: as by default."""

    shape: dict[str, Any]
    params: str
    quantization: str | None = None
    bucket_mb: float = 512
    compiled: bool | None = None

    def config(self, model: Path) -> TrainConfig:
        eager = None if self.compiled is None else not self.compiled
        longest = max(PROMPT_TOKENS)
        return TrainConfig(
            name="gpu-check",
            student=str(model),
            teacher=str(model),
            steps=ROUNDS,
            horizon=HorizonConfig(strategy="full", max_len=TOKENS, min_len=1, init_len=None),
            rollout=RolloutConfig(
                max_prompt_len=longest,
                max_num_seqs=PROMPTS,
                kv_cache_gb=0.02,
                quantization=self.quantization,  # type: ignore[arg-type]
                bucket_mb=self.bucket_mb,
                enforce_eager=eager,
            ),
            parallel=ParallelConfig(nproc=1, tensor=1, distributed_optimizer=self.params == "bf16"),
            precision=PrecisionConfig(params=self.params),  # type: ignore[arg-type]
            memory=MemoryConfig(sleep_level=2),
        )


def loaded(job: Job, folder: Path, machine: Platform) -> dict[str, Any]:
    """Counts and times of the syncs, what the engine was away from the trainer after each, and what it generates."""
    from prune_opd.config.memory_phases import MemoryPhases
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.model import dtype_of
    from prune_opd.megatron.offload import handlers
    from prune_opd.megatron.sync import WeightSync
    from prune_opd.megatron.trainer import Trainer
    from prune_opd.rollout.phase import RolloutPhase
    from prune_opd.weights.stream import export_hf

    write_model(job, folder, machine)
    config, dtype = job.config(folder / "start"), dtype_of(job.params)
    layout = layouts.initialize(config.parallel, machine, config.seed)
    trainer = Trainer(config.student, config.optimizer, config.parallel, ROUNDS, layout, dtype, machine.device)
    engine = build_engine(config, dtype, machine)
    moves = None if machine.is_cpu else handlers(trainer, None, lambda: engine, machine)
    phases, began = MemoryPhases(config.memory, moves), {}

    def enter(phase: str) -> None:
        machine.synchronize()
        began.setdefault(f"before {phase}", time.perf_counter())
        phases.enter(phase)
        began.setdefault(phase, time.perf_counter())

    source: Any = SimpleNamespace(size=None, get=lambda index: prompts(trainer.spec.vocab_size)[index])
    sync = WeightSync(
        config, trainer, RolloutPhase(config, engine, SimpleNamespace(source=source, endless=True)), enter
    )
    seconds, away = [], []
    for number in range(1, ROUNDS + 1):
        draw_again(trainer.chunks, number)
        enter("train")  # the engine sleeps
        spoil_free_memory(machine)
        began.clear()
        sync(number)
        enter("parity")
        seconds.append(began["before parity"] - began["sync"])
        away.append(sync.check_parity())
    items = [item for bucket in sync.resharder.buckets for item in bucket.items]
    export_hf(trainer.chunks, config.student, folder / "exported", write=True)
    return {
        "tensors": sum(len(item.entry.hf) for item in items),
        "bytes": sum(prod(shape) * item.dtype.itemsize for item in items for shape in item.entry.shapes),
        "buckets": len(sync.resharder.buckets),
        "seconds": seconds,
        "away": away,
        "asynchronous": engine.llm.llm_engine.vllm_config.scheduler_config.async_scheduling,
        **generated(engine, trainer.spec.vocab_size),
    }


def fresh(job: Job, folder: Path, machine: Platform) -> dict[str, Any]:
    """What an engine generates that has read the exported weights itself."""
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.model import dtype_of

    config = job.config(folder / "exported")
    layouts.initialize(config.parallel, machine, config.seed)
    return generated(build_engine(config, dtype_of(job.params), machine), job.shape["vocab_size"])


def build_engine(config: TrainConfig, dtype: torch.dtype, machine: Platform) -> Any:
    from prune_opd.rollout.engine import EngineOptions, RolloutEngine

    options = EngineOptions(config.memory.sleep_level, timeout_minutes=5, end_id=1)  # with an end, no tokenizer
    return RolloutEngine(config.student, config.rollout, TOKENS, dtype, machine, options)


def generated(engine: Any, vocab_size: int) -> dict[str, Any]:
    """Greedy tokens of every prompt, and their log-probabilities. The engine ends."""
    from prune_opd.rollout.request import TokenSampling, new_rows

    engine.llm.reset_prefix_cache()  # a prompt that is known is computed in other pieces, and rounded otherwise
    rows = new_rows(prompts(vocab_size)[-PROMPTS:], 1, TOKENS)
    found = engine.generate(rows, TokenSampling(seed=0, step=0, temperature=0.0, logprobs=True)).responses
    engine.close()
    return {"ids": [response.ids for response in found], "logprobs": [response.logprobs for response in found]}


def prompts(vocab_size: int) -> list[Prompt]:
    """Made-up ones: some for the comparison with the trainer, others for the one with a fresh engine."""
    draw = torch.Generator().manual_seed(4)
    lengths = [PROMPT_TOKENS[i % len(PROMPT_TOKENS)] for i in range(2 * PROMPTS)]
    ids = [torch.randint(2, vocab_size, (length,), generator=draw).tolist() for length in lengths]
    return [Prompt(i, tuple(each), None, "made up") for i, each in enumerate(ids)]


def write_model(job: Job, folder: Path, machine: Platform) -> None:
    """FOLDER/start: a Hugging Face directory of the shape, its weights drawn."""
    from prune_opd.megatron.model import dtype_of
    from prune_opd.model_spec import ModelSpec
    from prune_opd.weights.files import HfDirectoryWriter
    from prune_opd.weights.mapping import entries

    (folder / "config.json").write_text(json.dumps(job.shape))
    writer = HfDirectoryWriter(folder / "start", folder, FILE_BYTES)
    draw = torch.Generator(machine.device).manual_seed(0)
    for entry in entries(ModelSpec.read(folder)):
        for name, shape in zip(entry.hf, entry.shapes, strict=True):
            values = torch.randn(shape, generator=draw, device=machine.device)
            values *= 0.1 if len(shape) == 1 else shape[-1] ** -0.5
            writer.add(name, (values + (1 if "norm" in name else 0)).to(dtype_of(job.params)))
    writer.finish()


@torch.no_grad()
def draw_again(chunks: Any, seed: int) -> None:
    """Another student, whose numbers are distributed as before: what an engine keeps of the old one is far off."""
    for parameter in parameters(chunks):
        draw = torch.Generator(parameter.device).manual_seed(seed)
        values = torch.randn(parameter.shape, generator=draw, device=parameter.device)
        one = parameter.float()
        parameter.copy_(one.mean() + one.std() * values)
        seed += ROUNDS


def parameters(chunks: Any) -> Iterator[Tensor]:
    return (parameter for chunk in chunks for parameter in chunk.parameters())


def spoil_free_memory(machine: Platform) -> None:
    """Fill what is free of the device with NaN, which the next owner finds there. On a CPU nothing has been freed."""
    if machine.is_cpu:
        return
    torch.cuda.empty_cache()
    free, _ = machine.device_memory()
    torch.full((int(SPOILED * free) // 4,), float("nan"), device=machine.device)
    torch.cuda.empty_cache()


def main(kind: str, folder: Path) -> None:
    machine = platform.prepare()
    job = Job(**json.loads((folder / "job.json").read_text()))
    found = {"loaded": loaded, "fresh": fresh}[kind](job, folder, machine)
    (folder / f"{kind}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
