"""A student and a teacher of made-up weights on one GPU, without Transformer Engine: steps, NaN, checkpoints, memory.

python -m scripts.gpu.training fp32|bf16      the numbers of three steps on this machine, as JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from prune_opd import platform
from prune_opd.config import (
    CheckpointConfig,
    GateConfig,
    HorizonConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    TrainConfig,
)
from prune_opd.platform import Platform
from scripts.gpu.rows import VOCAB, Row, Size

STEPS = 3
TINY: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "eos_token_id": 1,
}
LENGTHS = (40, 7, 64, 21)  # of the tiny pair's responses
WHOLE = ObjectiveConfig("full_vocab_reverse_kl")


@contextmanager
def drawn_weights() -> Iterator[None]:
    """Model directories need no weights: each tensor is drawn from its name and its directory's."""
    import prune_opd.weights.load as load
    from prune_opd.rehearse.machine import ShapesOnly

    class Drawn(ShapesOnly):
        def read(self, name: str, dim: int, begin: int, end: int) -> Tensor:
            draw = torch.Generator().manual_seed(zlib.crc32(f"{self.directory.name} {name}".encode()))
            shape = self.shape(name)
            values = torch.randn(shape, generator=draw) * (0.1 if len(shape) == 1 else shape[-1] ** -0.5)
            return (values + (1 if "norm" in name else 0)).narrow(dim, begin, end - begin).bfloat16()

    with mock.patch.object(load, "SafetensorsDirectory", Drawn):
        yield


class Pair:
    """Trainer and teacher of a shape, alone in a job, and a batch of made-up rows."""

    def __init__(self, machine: Platform, config: TrainConfig, layout: Any, lengths: tuple[int, ...], prompt: int):
        from prune_opd.megatron.model import dtype_of
        from prune_opd.megatron.packing import pack_rows
        from prune_opd.megatron.teacher import Teacher
        from prune_opd.megatron.trainer import Trainer

        self.machine, self.config, self.layout, self.lengths = machine, config, layout, lengths
        dtype, parallel = dtype_of(config.precision.params), config.parallel
        self.trainer = Trainer(config.student, config.optimizer, parallel, 10, layout, dtype, machine.device)
        self.teacher = Teacher(config.teacher, layout, dtype, machine.device, parallel.microbatch_tokens)
        vocab = self.trainer.spec.vocab_size
        draw = torch.Generator().manual_seed(3)

        def ids(count: int) -> list[int]:
            return torch.randint(2, vocab, (count,), generator=draw).tolist()

        rows = [(ids(prompt), ids(length)) for length in lengths]
        self.batch = pack_rows(
            [row[0] for row in rows],
            [row[1] for row in rows],
            range(len(rows)),
            machine.device,
            self.trainer.chunks[0].token_multiple,
        )
        self.spoil: Callable[[Tensor], Tensor] = lambda hidden: hidden

    def step(self) -> tuple[float, float, int]:
        """Loss, gradient norm and updates of one step."""
        from prune_opd.loss.stats import BatchStats
        from prune_opd.loss.training_loss import gated_loss
        from prune_opd.megatron.schedule import forward

        found: list[Tensor] = []
        forward(
            self.teacher.chunks,
            self.layout.teacher,
            [self.batch],
            lambda batch, hidden: found.append(hidden[batch.predicting_M]),
        )
        hidden = self.spoil(found[0])
        stats = BatchStats(len(self.lengths), 4, max(self.lengths), self.machine.device)
        answers: Any = SimpleNamespace(packed=lambda rows: hidden)
        loss = gated_loss(self.config, self.teacher, answers, self.trainer.spec.vocab_size, None, stats)
        result = self.trainer.step([self.batch], loss)
        return result.loss, result.grad_norm, result.updates

    def parameters(self) -> list[Tensor]:
        return [parameter.detach().clone() for chunk in self.trainer.chunks for parameter in chunk.parameters()]


@contextmanager
def pairs(
    machine: Platform, params: str, shape: dict[str, Any], lengths: tuple[int, ...], prompt: int = 5, **parallel: Any
) -> Iterator[Callable[[], Pair]]:
    """Makes pairs of a shape, one after the other, in a job of one rank that ends afterwards."""
    from prune_opd.megatron import layout as layouts

    sizes = ParallelConfig(nproc=1, tensor=1, distributed_optimizer=params == "bf16", **parallel)
    with tempfile.TemporaryDirectory(prefix="prune-opd-") as folder, drawn_weights():
        for role in ("student", "teacher"):
            (Path(folder) / role).mkdir()
            (Path(folder) / role / "config.json").write_text(json.dumps(shape))
        longest = max(lengths)
        config = TrainConfig(
            name="gpu-check",
            student=f"{folder}/student",
            teacher=f"{folder}/teacher",
            steps=10,
            horizon=HorizonConfig(strategy="full", max_len=longest, min_len=1, init_len=None),
            rollout=RolloutConfig(prompts=len(lengths), responses=1, max_prompt_len=prompt),
            gate=GateConfig(k=4),
            objective=WHOLE,
            optimizer=OptimizerConfig(lr=1e-2, eps=1e-2),
            parallel=sizes,
            precision=PrecisionConfig(params=params),  # type: ignore[arg-type]
            checkpoint=CheckpointConfig(keep=2),
        )
        layout = layouts.initialize(sizes, machine, 0)
        try:
            yield lambda: Pair(machine, config, layout, lengths, prompt)
        finally:
            layouts.shutdown()


def numbers(machine: Platform, params: str) -> list[tuple[float, float, int]]:
    with pairs(machine, params, TINY, LENGTHS) as make:
        pair = make()
        return [pair.step() for _ in range(STEPS)]


def steps_step(machine: Platform, size: Size) -> Iterator[Row]:
    """Three steps of a tiny pair in fp32 and bf16: the loss falls, and is the one that a CPU finds."""
    for params, most in (("fp32", 1e-3), ("bf16", 3e-2)):
        ours = numbers(machine, params)
        losses = [loss for loss, _, _ in ours]
        figure = " → ".join(f"{loss:.5f}" for loss in losses)
        yield Row("steps", f"loss of {STEPS} steps, {params}", figure, "it falls", losses == sorted(losses)[::-1])
        if machine.is_cpu:
            continue
        theirs = _on_the_cpu(params)
        steps = zip(ours, theirs, strict=True)
        error = max(abs(one[i] - other[i]) / abs(other[i]) for one, other in steps for i in (0, 1))
        figure = f"{error:.1e} from a CPU's"
        yield Row("steps", f"losses and gradient norms, {params}", figure, f"< {most:g}", error < most)


def _on_the_cpu(params: str) -> Any:
    program = [sys.executable, "-m", "scripts.gpu.training", params]
    done = subprocess.run(
        program, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=300, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def trouble_step(machine: Platform, size: Size) -> Iterator[Row]:
    """Hidden states of the teacher that are not finite: the update is left out, and the next one is made."""
    with pairs(machine, "bf16", TINY, LENGTHS) as make:
        pair = make()
        before = pair.parameters()
        pair.spoil = lambda hidden: hidden * float("nan")
        updates = pair.step()[2]
        same = all(torch.equal(a, b) for a, b in zip(before, pair.parameters(), strict=True))
        figure = f"{updates}, weights {'as before' if same else 'changed'}"
        yield Row("trouble", "updates from NaN", figure, "0, as before", updates == 0 and same)
        pair.spoil = lambda hidden: hidden
        loss, norm, updates = pair.step()
        good = updates == 1 and loss < float("inf") and norm > 0
        yield Row("trouble", "the step after it", f"loss {loss:.5f}, {updates} update", "1 update", good)


def checkpoint_step(machine: Platform, size: Size) -> Iterator[Row]:
    """A checkpoint that is written while training goes on: two resumes from it train as the run that was left alone."""
    from prune_opd.megatron.checkpoint import Checkpoints

    with tempfile.TemporaryDirectory() as folder, pairs(machine, "bf16", TINY, LENGTHS) as make:
        pair = make()
        pair.step()
        checkpoints = Checkpoints(Path(folder), pair.config.checkpoint, pair.layout)
        begin = time.perf_counter()
        checkpoints.save(1, pair.trainer, {})
        begun = time.perf_counter() - begin
        unbroken = [pair.step()[0] for _ in range(2)]
        checkpoints.finish()
        yield Row("checkpoint", "before training goes on", f"{begun:.2f} s", "", None)
        latest = checkpoints.latest()
        assert latest is not None
        for number in (1, 2):
            again = make()
            checkpoints.load(latest, again.trainer)
            resumed = [again.step()[0] for _ in range(2)]
            error = max(abs(a - b) / abs(b) for a, b in zip(resumed, unbroken, strict=True))
            most = 0.0 if machine.is_cpu else 1e-3
            figure = f"{error:.1e} from the unbroken run"
            yield Row("checkpoint", f"resume {number}", figure, f"≤ {most:g}", error <= most)


def memory_step(machine: Platform, size: Size) -> Iterator[Row]:
    """A step of Qwen3-0.6B's shape at 16 k tokens: its time, and its peak beside the planner's, with and without
    recompute. The layers are megatron-core's and torch's attention; the planner's are Transformer Engine's."""
    from prune_opd.plan.memory import part_bytes, working_bytes
    from prune_opd.plan.setting import setting_of

    full = size.vocab == VOCAB
    shape = {**TINY, "num_hidden_layers": size.layers, "hidden_size": size.width, "vocab_size": size.vocab}
    if full:
        shape |= {"intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    prompt = size.row // 8
    lengths = (size.row - prompt,) * size.rows
    tokens = size.row * size.rows
    for recompute in ("none", "full"):
        budget = {"microbatch_tokens": tokens, "recompute": recompute, "loss_chunk_tokens": size.chunk}
        with pairs(machine, "bf16", shape, lengths, prompt, **budget) as make:
            pair = make()
            pair.step()
            machine.synchronize()
            machine.watch_memory()
            begin = time.perf_counter()
            pair.step()
            machine.synchronize()
            seconds = time.perf_counter() - begin
            flops = 8 * sum(p.numel() for p in pair.parameters()) * tokens  # 6 of the student, 2 of the teacher
            figure = f"{1e3 * seconds:.0f} ms, {flops / seconds / 1e12:.3g} TFLOP/s without attention"
            yield Row("memory", f"{tokens} tokens, recompute={recompute}", figure, "", None)
            if machine.is_cpu:
                continue
            setting = setting_of(pair.config, "h100", 1)
            parts = part_bytes(setting)
            resident = sum(parts[name] for name in ("student", "gradients", "optimizer", "teacher", "teacher_head"))
            planned, peak = resident + working_bytes(setting)["train"], machine.memory()
            figure = f"{peak / 1e9:.2f} GB, planned {planned / 1e9:.2f}"
            yield Row("memory", f"peak, recompute={recompute}", figure, "within 25 %", abs(peak / planned - 1) < 0.25)


if __name__ == "__main__":
    print(json.dumps(numbers(platform.prepare(), sys.argv[1])))
