"""vLLM's weights after reloads: those of Qwen3-30B-A3B's experts and FP8 ones, beside an engine that has read them from
a disk.

Each engine has a process of its own (scripts/gpu/engine_worker.py), and its weights are made there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prune_opd.check.precision import rollout_problems
from prune_opd.config import RolloutConfig
from prune_opd.config.rollout import MISMATCH_LIMIT
from prune_opd.platform import Platform
from scripts.gpu.engine_worker import ROUNDS, Job
from scripts.gpu.rows import VOCAB, Row, Size
from scripts.gpu.training import TINY

SECONDS = 400  # of a process
RIVAL_MS = 1000 / 18_867  # a tensor: NeMo-RL syncs Qwen3-30B-A3B in a second on H100s
ALIKE = 1e-4  # nats by which tokens may differ that two engines make of the same weights
EXPERTS_BUCKET_MB = 2560  # as in the recipe: two layers
EXPERT_FORMATS = (None, "fp8_per_tensor")
DENSE_FORMATS = ("fp8_per_block",)
ON_A_CPU = (*DENSE_FORMATS, "fp8_per_channel")  # the second one is what vLLM has there
# fmt: off
EXPERTS = {
    **TINY, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "tie_word_embeddings": False,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}
# fmt: on


def experts_step(machine: Platform, size: Size) -> Iterator[Row]:
    """Two layers of Qwen3-30B-A3B with all its experts: syncs, what they cost a tensor, and what they leave behind."""
    shape = EXPERTS | {"vocab_size": size.vocab}
    if size.vocab == VOCAB:
        shape |= {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4}
        shape |= {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    for quantization in EXPERT_FORMATS:
        yield from _reloads("experts", machine, shape, quantization, bucket_mb=EXPERTS_BUCKET_MB, compiled=False)


def reload_step(machine: Platform, size: Size) -> Iterator[Row]:
    """A dense model in FP8, as its recipes have it, whose weights are replaced under the graphs of a GPU."""
    shape = TINY | {"vocab_size": size.vocab}
    if size.vocab == VOCAB:  # four layers of Qwen3-8B's widths
        shape |= {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8}
        shape |= {"head_dim": 128, "num_hidden_layers": 4}
    for quantization in ON_A_CPU if machine.is_cpu else DENSE_FORMATS:
        yield from _reloads("reload", machine, shape, quantization)


def _reloads(
    step: str, machine: Platform, shape: dict[str, Any], quantization: str | None, **settings: Any
) -> Iterator[Row]:
    params = "fp32" if machine.is_cpu and quantization is None else "bf16"
    name = quantization or params
    if importlib.util.find_spec("vllm") is None:
        yield Row(step, name, "not here (no vllm)", "", None)
        return
    rollout = RolloutConfig(quantization=quantization)  # type: ignore[arg-type]
    if problems := rollout_problems(rollout, params, shape, gpu=not machine.is_cpu):
        yield Row(step, name, f"not here ({problems[0].partition(':')[0]})", "", None)
        return
    with tempfile.TemporaryDirectory() as folder:
        job = Job(shape, params, quantization, **settings)
        (Path(folder) / "job.json").write_text(json.dumps(asdict(job)))
        try:
            loaded = _process("loaded", Path(folder))
            yield from _syncs(step, name, machine, loaded)
            yield _beside(step, name, loaded, _process("fresh", Path(folder)))
        except (RuntimeError, subprocess.TimeoutExpired) as error:  # the next format may still do
            yield Row(step, name, str(error)[:300], "two engines come to their end", False)


def _process(kind: str, folder: Path) -> dict[str, Any]:
    program = [sys.executable, "-m", "scripts.gpu.engine_worker", kind, str(folder)]
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", **os.environ}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()[-1]
        raise RuntimeError(f"the {kind} engine ended with exit code {done.returncode}: {last}")
    found: dict[str, Any] = json.loads((folder / f"{kind}.json").read_text())
    return found


def _syncs(step: str, name: str, machine: Platform, found: dict[str, Any]) -> Iterator[Row]:
    tensors, least = found["tensors"], min(found["seconds"])
    each = 1e3 * least / tensors
    what = f"{tensors} tensors, {found['bytes'] / 1e9:.3g} GB in {found['buckets']} buckets"
    figure = f"{1e3 * least:.1f} ms, {each:.3f} a tensor; {what}; the first time {1e3 * found['seconds'][0]:.1f} ms"
    rival = step == "experts" and not machine.is_cpu
    expected = f"at most {RIVAL_MS:.3f} ms a tensor (NeMo-RL's second for the whole model)" if rival else ""
    yield Row(step, f"{name}: sync", figure, expected, each <= RIVAL_MS if rival else None)
    limit, most = MISMATCH_LIMIT["fp8" if name.startswith("fp8") else name], max(found["away"])
    yield Row(step, f"{name}: |Δ| from the trainer, {ROUNDS} syncs", f"{most:.1e} nats", f"≤ {limit:g}", most <= limit)
    if not machine.is_cpu:
        asynchronous = found["asynchronous"]
        yield Row(step, f"{name}: schedules asynchronously", str(asynchronous), "True", asynchronous)


def _beside(step: str, name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Row:
    """Of responses that part the log-probabilities of the tokens before are compared."""
    alike, most = 0, 0.0
    for ids, other, logprobs, others in zip(
        ours["ids"], theirs["ids"], ours["logprobs"], theirs["logprobs"], strict=True
    ):
        alike += ids == other
        for one, two, a, b in zip(ids, other, logprobs, others, strict=False):
            if one != two:
                break
            most = max(most, abs(a - b))
    figure = f"{alike} of {len(ours['ids'])} responses alike, |Δ| {most:.1e} nats"
    expected = f"all of them, ≤ {ALIKE:g}"
    passed = alike == len(ours["ids"]) and most <= ALIKE
    return Row(step, f"{name}: beside a fresh engine of the exported weights", figure, expected, passed)
