"""Ranks of test_engine.py: one engine configuration, as one process can have only one.

    torchrun … worker_engine.py MODELS OUT PIPELINE ROLLOUT_TP MAX_NUM_SEQS KV_CACHE_GB eager|compiled

The trainer has PIPELINE stages, and all the tensor parallelism that is left of the ranks. Every rank writes
OUT/rank<r>.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prune_opd import platform
from prune_opd.config import ParallelConfig, RolloutConfig
from prune_opd.data import ledger
from prune_opd.data.prompt import Prompt
from prune_opd.errors import UserError
from prune_opd.rollout.batch import Rollouts
from prune_opd.rollout.request import TokenSampling, new_rows
from tests.distributed.tiny_run import build_run, train_config
from tests.models import VOCAB

MAX_TOKENS, RESPONSES, SEED, STEP = 24, 2, 11, 3
EOS = ledger.TOKEN_ID[ledger.EOS]
LENGTHS = (5, 40, 1, 170, 12)  # the long one fills blocks of the prefix cache


MANY = (250,) * 36  # prompt tokens, more together than vLLM takes into one prefill (8192)


def compiled_graphs() -> int:
    """How many torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def make_prompts(lengths: Sequence[int] = LENGTHS) -> list[Prompt]:
    draw = torch.Generator().manual_seed(2)
    return [
        Prompt(7 * i, tuple(torch.randint(3, VOCAB, (n,), generator=draw).tolist()), None, "test")
        for i, n in enumerate(lengths)
    ]


class Checks:
    """What the tests assert, by name. Every use of the engine goes through here, and is watched."""

    def __init__(self, run: Any, rollout: RolloutConfig):
        from prune_opd.rollout.engine import EngineOptions, RolloutEngine

        self.run, self.rollout, self.rng_changed = run, rollout, []
        self.threads = torch.get_num_threads()
        dtype, machine = torch.float32, run.machine
        options = EngineOptions(end_id=EOS)  # vLLM has no tokenizer
        build = lambda: RolloutEngine(run.config.student, rollout, 64, dtype, machine, options)  # noqa: E731
        self.engine = run.rollout.engine = self.watched("construct", build)

    def watched(self, what: str, call: Any) -> Any:
        before = platform.rng_state()
        result = call()
        if platform.rng_state() != before:
            self.rng_changed.append(what)
        return result

    def load(self, model: Any) -> None:
        from prune_opd.weights.stream import Resharder

        self.watched("load", lambda: self.engine.load(Resharder(model, in_order=True).stream()))

    def generate(self, prompts: Sequence[Prompt], responses: int = RESPONSES, **changes: Any) -> Rollouts:
        rows = new_rows(prompts, responses, changes.pop("max_tokens", MAX_TOKENS))
        sampling = TokenSampling(**{"seed": SEED, "step": STEP, **changes})
        return self.watched("generate", lambda: self.engine.generate(rows, sampling))

    def tokens(self, prompts: Sequence[Prompt], responses: int = RESPONSES, **changes: Any) -> dict[str, list[int]]:
        """Response ids under "prompt index/sample", so that order and batch do not show."""
        rollouts = self.generate(prompts, responses, **changes)
        assert [prompt.index for prompt in rollouts.prompts] == [p.index for p in prompts for _ in range(responses)]
        rows = enumerate(zip(rollouts.prompts, rollouts.response_ids, strict=True))
        return {f"{prompt.index}/{row % responses}": list(ids) for row, (prompt, ids) in rows}

    def parity(self, model: Any, temperature: float = 1.0) -> float:
        """Largest difference in a sampled token's log-probability between the engine and `model` in the trainer."""
        from prune_opd.megatron.logprobs import sampled_logprobs

        rollouts = self.generate(make_prompts(), logprobs=True, temperature=temperature)
        theirs = [logprob for response in rollouts.responses for logprob in response.logprobs]
        ours = sampled_logprobs(model, rollouts, self.run.layout, self.run.machine.device)
        return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))

    def swapped_layers(self) -> str:
        """What the first sync of a run says when the stream has swapped the names of two layers."""
        from prune_opd.weights.stream import Resharder

        class Swapped(Resharder):
            def stream(self) -> Any:
                other = {"0": "1", "1": "0"}
                for name, tensor in super().stream():
                    parts = name.split(".")
                    yield ".".join(other.get(part, part) for part in parts), tensor

        self.run.sync.resharder, self.run.sync.engine_has = Swapped(self.run.trainer.chunks), None
        try:
            self.run.sync(self.run.finished_steps)
        except UserError as reason:
            return str(reason)
        finally:
            del self.run.sync.resharder
            self.run.sync.engine_has = None
        return ""

    def stale_prefixes(self, model: Any, other: Any) -> tuple[float, float]:
        """Parity after a reload that keeps the cached prefixes of other weights, and after one that does not."""
        self.load(other)
        self.parity(other)  # fills the cache
        reset, self.engine.llm.reset_prefix_cache = self.engine.llm.reset_prefix_cache, lambda: True
        self.load(model)
        stale = self.parity(model)
        self.engine.llm.reset_prefix_cache = reset
        self.load(model)
        return stale, self.parity(model)

    def compared(self, every: int) -> list[int]:
        """The steps of a new run whose sync compares log-probabilities. every: rollout.parity_every."""
        from prune_opd.megatron.sync import WeightSync

        config = dataclasses.replace(self.run.config, rollout=dataclasses.replace(self.rollout, parity_every=every))
        sync = WeightSync(config, self.run.trainer, self.run.rollout, lambda phase: None)
        steps: list[int] = []
        sync.check_parity = lambda: steps.append(sync.engine_has)  # type: ignore[method-assign,arg-type]
        for step in (0, 1, 2, 2, 3, 4, 5, 7):
            sync(step)
        return steps

    def second_load_that_does_nothing(self) -> str:
        """What the second sync says when the engine keeps its old weights. No check may follow this one."""
        self.run.finished_steps += 1
        self.engine.load = lambda weights: [None for _ in weights]
        with torch.no_grad():
            for chunk in self.run.trainer.chunks:
                for parameter in chunk.parameters():
                    parameter.mul_(1.5)
        try:
            self.run.sync(self.run.finished_steps)
        except UserError as reason:
            return str(reason)
        return ""

    def parity_error(self) -> str:
        """What the check after the first sync says of the weights that the engine holds now."""
        try:
            self.run.sync.check_parity()
        except UserError as reason:
            return str(reason)
        return ""


class SharedMemory:
    """What a run with this run's port and one with another port left in /dev/shm when they were killed."""

    def __init__(self, rank: int, world: int) -> None:
        group = f"tp:0-[{'-'.join(map(str, range(world)))}]-cpushm"
        port = os.environ["MASTER_PORT"]
        self.mine, self.others = (Path("/dev/shm", f"prune-opd-{run}-{group}_{rank}") for run in (port, f"{port}0"))
        for path in (self.mine, self.others):
            path.write_bytes(b"left behind")

    def found(self) -> list[dict[str, Any]]:
        """Once the engine is there: both as they are, the same on every rank.

        "shared": vLLM's kernels for this processor have shared memory; those for one without AVX-512 have none.
        """
        sizes = [path.stat().st_size for path in (self.mine, self.others)]
        self.others.unlink()
        shared = hasattr(torch.ops._C, "init_shm_manager")
        if not shared:
            self.mine.unlink()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (str(self.mine), *sizes, shared))
        return [dict(zip(("path", "in use", "others", "shared"), each, strict=True)) for each in everyone]


def norms() -> dict[str, Any]:
    """The RMSNorm of the engine: who is asked first, its distance from vLLM's torch operations, what it leaves to them.

    Distances in machine epsilons of the largest value.
    """
    from vllm import ir

    found: dict[str, Any] = {"first": ir.ops.rms_norm.get_priority()[0]}
    ours = ir.ops.rms_norm.impls.get(found["first"]), ir.ops.fused_add_rms_norm.impls.get(found["first"])
    theirs = ir.ops.rms_norm.impls["native"], ir.ops.fused_add_rms_norm.impls["native"]
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(3)
        product, residual, weight = (
            torch.randn(shape, generator=generator).to(dtype) for shape in ((24, 160), (24, 96), (96,))
        )
        heads, inner = product[:, 64:].view(24, 3, 32), product[:, 64:].contiguous()  # strided, as queries and keys are

        def apart(first: Any, second: Any, dtype: torch.dtype = dtype) -> float:
            distance = (torch.as_tensor(first).double() - second.double()).abs().max() / second.double().abs().max()
            return float(distance) / torch.finfo(dtype).eps

        pair = [each.func_impl_fn(inner, residual, weight, 1e-6) for each in (ours[1], theirs[1])]
        found[str(dtype)] = [
            apart(ours[0].func_impl_fn(heads, weight[:32], 1e-6), theirs[0].func_impl_fn(heads, weight[:32], 1e-6)),
            apart(ours[0].func_impl_fn(inner, weight, 1e-6), theirs[0].func_impl_fn(inner, weight, 1e-6)),
            *(apart(*each) for each in zip(*pair, strict=True)),
        ]
    fits = ours[0].supports_args
    found["left to torch"] = [
        not fits(inner, None, 1e-6),
        not fits(inner, weight.float(), 1e-6),
        not fits(inner, weight, 1e-6, 16),
        not ours[1].supports_args(product[:, 64:], residual, weight, 1e-6),
    ]
    return found


def main(
    models: Path, out: Path, pipeline: int, rollout_tp: int, max_num_seqs: int, kv_cache_gb: float, compiled: bool
) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.model import build

    layout = layouts.initialize(ParallelConfig(pipeline=pipeline), machine, seed=0)
    rollout = RolloutConfig(
        tensor_parallel=rollout_tp,
        max_prompt_len=256,
        max_num_seqs=max_num_seqs,
        kv_cache_gb=kv_cache_gb,
        enforce_eager=False if compiled else None,
    )
    run = build_run(train_config(models, layout.student.tp, rollout=rollout), layout, out)
    # Other weights for the engine, in the student's layout: the teacher of the run has its own, and no head of a stage.
    teacher = build(run.config.teacher, layout.student, torch.float32, trainable=False)
    student, prompts = run.trainer.chunks, make_prompts()
    segments = SharedMemory(layout.rank, layout.world) if rollout_tp > 1 else None
    checks = Checks(run, rollout)
    graphs = compiled_graphs()
    results: dict[str, Any] = {"tokens": checks.tokens(prompts)}

    results["shared memory"] = segments.found() if segments else None
    results["reversed"] = checks.tokens(prompts[::-1])
    results["one by one"] = {}
    for prompt in prompts:  # with one response: some engines have nothing to do
        results["one by one"] |= checks.tokens([prompt], responses=1)
    results["greedy"] = [checks.tokens(prompts, temperature=0.0, seed=seed) for seed in (1, 2)]
    results["another seed"] = checks.tokens(prompts, seed=SEED + 1)
    results["another step"] = checks.tokens(prompts, step=STEP + 1)
    results["twice in a batch"] = [list(ids) for ids in checks.generate(prompts[1:] + prompts[1:]).response_ids]
    many = make_prompts(MANY)
    results["many"] = checks.tokens(many, responses=1, max_tokens=8)
    results["many, by ten"] = {}
    for first in range(0, len(many), 10):
        results["many, by ten"] |= checks.tokens(many[first : first + 10], responses=1, max_tokens=8)
    limits = [1 + 3 * row % MAX_TOKENS for row in range(len(prompts) * RESPONSES)]
    results["limited"] = [limits, list(checks.tokens(prompts, max_tokens=limits).values())]
    longer = checks.generate(prompts, responses=8, max_tokens=MAX_TOKENS + 8)
    results["longer"] = [[list(response.ids), response.finished] for response in longer.responses]
    seen = [i for response in longer.responses for i in response.ids if i != EOS]
    checks.engine.stop_ids = [max(set(seen), key=seen.count)]
    stopped = checks.generate(prompts, responses=8, max_tokens=MAX_TOKENS + 8)
    results["stop ids"] = checks.engine.stop_ids
    results["stopped"] = [[list(response.ids), response.finished] for response in stopped.responses]
    checks.engine.stop_ids = []

    results["parity from disk"] = checks.parity(student)
    results["parity at temperature 0.6"] = checks.parity(student, temperature=0.6)
    checks.load(teacher)
    results["other weights"] = checks.tokens(prompts)
    results["parity of other weights"] = checks.parity(teacher)
    results["error of other weights"] = checks.parity_error()
    checks.load(student)
    results["reloaded"] = checks.tokens(prompts)
    results["parity after reload"] = checks.parity(student)
    results["stale prefixes"] = checks.stale_prefixes(student, teacher)
    results["error of swapped layers"] = checks.swapped_layers()
    checks.load(teacher)
    checks.watched("first sync", lambda: run.sync(run.finished_steps))
    results["synced"] = checks.tokens(prompts)

    results["compared"] = {str(every): checks.compared(every) for every in (0, 2, 1)}
    results["error of a second load that does nothing"] = checks.second_load_that_does_nothing()
    results["norms"] = norms()
    results["compiled graphs"] = {"at first": graphs, "in the end": compiled_graphs()}
    results["rng changed"] = checks.rng_changed
    results["threads"] = [checks.threads, torch.get_num_threads()]
    torch.set_num_threads(2)  # vLLM leaves one in its place that does nothing
    results["threads"].append(torch.get_num_threads())
    (out / f"rank{layout.rank}.json").write_text(json.dumps(results))
    run.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:6]), float(sys.argv[6]), sys.argv[7] == "compiled")
