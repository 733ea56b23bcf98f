"""Ranks of test_moe.py: one engine over both ranks, loaded with two sets of weights in turn.

torchrun … worker_moe.py FOLDER WIDTH_OF_AN_EXPERT eager|compiled
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prune_opd import platform
from prune_opd.config import RolloutConfig
from prune_opd.rollout.request import TokenSampling, new_rows
from tests.models import write_model
from tests.rollout.worker_engine import make_prompts

LENGTHS, MAX_TOKENS = (5, 40, 130), 16


def compare(engine: Any, directory: Path) -> dict[str, Any]:
    """Greedy responses of the engine against transformers, token by token."""
    from transformers import AutoModelForCausalLM

    sampling = TokenSampling(seed=0, step=0, temperature=0.0, logprobs=True)
    rollouts = engine.generate(new_rows(make_prompts(LENGTHS), 1, MAX_TOKENS), sampling)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    other, largest = 0, 0.0
    for prompt, response in zip(rollouts.prompts, rollouts.responses, strict=True):
        ids = torch.tensor([[*prompt.ids, *response.ids]])
        with torch.no_grad():
            logp_TV = model(ids).logits[0, len(prompt.ids) - 1 : -1].log_softmax(dim=-1)
        sampled = torch.tensor(response.ids)
        other += int((logp_TV.argmax(dim=-1) != sampled).sum())
        expected = logp_TV[torch.arange(len(sampled)), sampled]
        largest = max(largest, float((expected - torch.tensor(response.logprobs)).abs().max()))
    return {
        "other tokens": other,
        "largest difference": largest,
        "tokens": [list(response.ids) for response in rollouts.responses],
    }


def main(folder: Path, width: int, compiled: bool) -> None:
    machine = platform.prepare()
    dist.init_process_group(machine.backend)
    torch.set_num_threads(1)
    from safetensors.torch import load_file

    from prune_opd.rollout.engine import RolloutEngine

    directories = {name: folder / name for name in "ab"}
    if dist.get_rank() == 0:
        for seed, directory in enumerate(directories.values()):
            shape = {"moe_intermediate_size": width, "num_hidden_layers": 1 if compiled else 2}  # g++ takes its time
            write_model(directory, "qwen3_moe", tied=False, seed=seed, **shape)
    dist.barrier()
    rollout = RolloutConfig(
        tensor_parallel=2, max_prompt_len=256, max_num_seqs=8, kv_cache_gb=0.01, enforce_eager=not compiled
    )
    engine = RolloutEngine(str(directories["a"]), rollout, 32, torch.float32, machine)
    results = [{"weights": "from disk", **compare(engine, directories["a"])}]
    for name in "bab":
        engine.load(load_file(directories[name] / "model.safetensors").items())
        results.append({"weights": name, **compare(engine, directories[name])})
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(results))
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "compiled")
