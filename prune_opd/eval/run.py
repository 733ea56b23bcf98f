"""`prune-opd eval`: avg@k and pass@k of Hugging Face directories on tasks, without any training state.

cli ── EvalJob (JSON) ──▶ ranks: evaluate_model ── a line a task ──▶ standard output, results, generations
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.table import Table
from rich.text import Text

from prune_opd.config import DataConfig, ParallelConfig, RolloutConfig
from prune_opd.config.yaml import from_dict
from prune_opd.data.answers import pass_at
from prune_opd.errors import ConfigError
from prune_opd.eval.evaluate import Sampling, Scored, generation_rows, make_evaluator, write_rows
from prune_opd.model_spec import ModelSpec, model_config
from prune_opd.process import tell
from prune_opd.rollout.request import cached_tokens
from prune_opd.track.console import readable_answers
from prune_opd.track.metrics import Record, readable

ALONE = 0.9  # share of a GPU that the engine takes: nothing else is there
LARGEST_SHARE = 0.8  # of that, which weights may take
SEED = 20_000  # unlike the training evaluation's seed: no recipe was chosen by its results on these problems


@dataclass(frozen=True)
class EvalJob:
    """One model on some tasks, in plain values, so that it can go to the ranks as JSON.

    sampling: its `max_len` 0 means all positions that the model has left after the longest prompt. extract: EvalConfig.
    generations, results: JSONL files that rank 0 writes if they are given, with a line for each answer and each task.
    tensor_parallel: ranks that share one copy of the model.
    """

    model_dir: str
    tasks: tuple[DataConfig, ...]
    problems: int
    sampling: Sampling
    extract: str = "box"
    generations: str | None = None
    results: str | None = None
    tensor_parallel: int = 1

    @classmethod
    def from_json(cls, text: str) -> EvalJob:
        values = json.loads(text)
        tasks = tuple(from_dict(DataConfig, task) for task in values["tasks"])
        return cls(**values | {"tasks": tasks, "sampling": Sampling(**values["sampling"])})

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def evaluate_model(job: EvalJob) -> None:
    """Sample answers to held-out problems of each task and print one JSON line a task on rank 0.

    Raises:
        ConfigError: an unknown task, a prompt file without answers, or no positions left for a response.
    """
    tell("importing torch and vLLM")
    import torch

    from prune_opd import platform
    from prune_opd.rollout.engine import EngineOptions, RolloutEngine

    machine = platform.prepare()
    from prune_opd.data.tokenizer import load_tokenizer
    from prune_opd.megatron import layout as layouts

    layout = layouts.initialize(ParallelConfig(tensor=1), machine, seed=0)
    positions = json.loads((Path(job.model_dir) / "config.json").read_text())["max_position_embeddings"]
    tokenizer = load_tokenizer(job.model_dir)
    evaluators = [make_evaluator(tokenizer, task, job.problems, None, job.sampling, job.extract) for task in job.tasks]
    longest = max(len(prompt.ids) for evaluator in evaluators for prompt in evaluator.problems)
    room = positions - longest
    dtype = torch.float32 if machine.is_cpu else torch.bfloat16
    rollout = RolloutConfig(max_prompt_len=longest, tensor_parallel=job.tensor_parallel)
    if machine.is_cpu and room >= 1:
        room = min(room, _cache_room(job, rollout, longest, dtype.itemsize))
    if room < 1:
        raise ConfigError(
            f"a prompt of {longest} tokens leaves no room in the model's {positions} positions: shorten it"
        )
    max_len = min(job.sampling.max_len or room, room)
    if not machine.is_cpu:
        free, total = machine.device_memory()
        rollout = replace(rollout, gpu_memory_utilization=ALONE)
        if problem := room_problem(Path(job.model_dir), rollout, min(free, ALONE * total)):
            raise ConfigError(problem)
    tell("starting vLLM")
    engine = RolloutEngine(
        job.model_dir, rollout, max_len, dtype, machine, EngineOptions(end_id=tokenizer.eos_token_id)
    )
    answers: list[Record] = []
    results: list[Record] = []
    for evaluator in evaluators:
        evaluator.sampling = replace(job.sampling, max_len=max_len)
        scored = evaluator.run(engine)
        answers += generation_rows(scored, tokenizer)
        results.append({"model": job.model_dir, **result(scored)})
        if layout.is_main:
            print(json.dumps(results[-1]), flush=True)
    if layout.is_main and job.generations:
        write_rows(Path(job.generations), answers)
    if layout.is_main and job.results:
        write_rows(Path(job.results), results)
    engine.close()


def _cache_room(job: EvalJob, rollout: RolloutConfig, longest: int, value: int) -> int:
    """Response tokens that the KV cache on a CPU has room for; value: bytes of a number in it.

    ConfigError if `--max-len` asks for more.
    """
    spec = ModelSpec.of(model_config("MODEL_DIR", job.model_dir), job.model_dir)
    fits = cached_tokens(rollout.kv_cache_gb, spec.kv_bytes(value, job.tensor_parallel)) - longest
    if fits < max(job.sampling.max_len, 1):
        raise ConfigError(
            f"--max-len = {job.sampling.max_len}: on a CPU the KV cache of {rollout.kv_cache_gb:g} GiB has room for "
            f"{fits} response tokens of this model, after a prompt of {longest}: give --max-len {max(fits, 1)} or less"
        )
    return fits


def room_problem(model_dir: Path, rollout: RolloutConfig, room: float) -> str | None:
    """Why a model's weights leave no room for the responses on GPUs with `room` bytes; None if they do."""
    weights = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    if (share := weights / rollout.tensor_parallel) <= LARGEST_SHARE * room:
        return None
    needed = 2 ** math.ceil(math.log2(weights / (LARGEST_SHARE * room)))
    return (
        f"{model_dir} has {weights / 1e9:.1f} GB of weights, and --tensor-parallel {rollout.tensor_parallel} puts "
        f"{share / 1e9:.1f} GB of them on a GPU with room for {room / 1e9:.1f} GB, which leaves too little for the "
        f"responses: give --tensor-parallel {needed}, and at least as many ranks (--nproc)"
    )


def result(scored: Scored) -> Record:
    """A task's printed results: avg@k, its standard error and 95 % interval, pass@1, 2, 4 … k, lengths in tokens.

    `readable` is the share of the `answers` that could be read.
    """
    accuracy = scored.accuracy
    k = accuracy.k
    powers = [2**i for i in range(k.bit_length()) if 2**i < k]
    return {
        "task": scored.task,
        f"avg@{k}": accuracy.mean,
        "stderr": accuracy.stderr,
        "interval": accuracy.interval,
        **{f"pass@{j}": pass_at(scored.correct, j) for j in [*powers, k]},
        "problems": accuracy.n_problems,
        "answers": len(scored.answers),
        "readable": scored.readable,
        "response_length": scored.mean_length,
        "finished": scored.finished,
    }


def results_table(results: Sequence[Record]) -> Table:
    """A row for each model, a column for each task: avg@k with its 95 % interval, pass@k in brackets, below them how
    many answers could be read."""
    tasks = list(dict.fromkeys(line["task"] for line in results))
    table = Table("model", *tasks, "response tokens")
    for model in dict.fromkeys(line["model"] for line in results):
        own = {line["task"]: line for line in results if line["model"] == model}
        length = sum(line["response_length"] for line in own.values()) / len(own)
        table.add_row(Text(model), *(_cell(own[task]) if task in own else "" for task in tasks), f"{length:.0f}")
    return table


def _cell(line: Record) -> str:
    mean, passed = next(line[key] for key in line if key.startswith("avg@")), [k for k in line if k.startswith("pass@")]
    low, high = line["interval"]
    counts = readable(line)
    best = f"  ({passed[-1]} {line[passed[-1]]:.1%})" if len(passed) > 1 else ""
    return f"{mean:.1%}  {low:.1%} … {high:.1%}{best}" + (f"\n{readable_answers(counts)}" if counts else "")
