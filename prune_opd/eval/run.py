"""`prune-opd eval`: avg@k and pass@k of a Hugging Face directory on a task, without any training state."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from prune_opd import platform
from prune_opd.config import DataConfig, ParallelConfig, RolloutConfig
from prune_opd.data.prompts import held_out, make_source
from prune_opd.eval.evaluate import Evaluator
from prune_opd.rollout.engine import RolloutEngine

SEED = 20_000  # not the training evaluation's: these are problems that no recipe was chosen on


def evaluate_model(model_dir: Path, task: str, k: int, problems: int, max_len: int | None) -> None:
    """Sample `k` answers to each of `problems` held-out problems at T = 1 and print one JSON line on rank 0.

    Raises `ConfigError` for an unknown task or a prompt file without answers.
    """
    machine = platform.prepare()
    from transformers import AutoTokenizer

    from prune_opd.megatron import layout as layouts

    layout = layouts.initialize(ParallelConfig(tensor=1), machine, seed=0)
    config = json.loads((model_dir / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    data = DataConfig(source=task)
    source, prompts = make_source(data, tokenizer, SEED), held_out(data, tokenizer, SEED, problems)
    longest = max(len(prompt.ids) for prompt in prompts)
    max_len = min(max_len or config["max_position_embeddings"], config["max_position_embeddings"] - longest)
    dtype = torch.float32 if machine.is_cpu else torch.bfloat16
    engine = RolloutEngine(str(model_dir), RolloutConfig(max_prompt_len=longest), max_len, dtype, machine)
    accuracy, length = Evaluator(engine, tokenizer, source, prompts, k, max_len, 1.0, 1.0, SEED).accuracy()
    if layout.is_main:
        result = {
            "model": str(model_dir),
            "task": source.name,
            f"avg@{k}": accuracy.mean,
            "stderr": accuracy.stderr,
            f"pass@{k}": accuracy.pass_at_k,
            "problems": accuracy.n_problems,
            "response_length": length,
        }
        print(json.dumps(result), flush=True)
    engine.close()
