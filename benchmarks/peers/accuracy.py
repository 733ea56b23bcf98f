"""The evaluation of `prune-opd bench peers`: one engine, every saved model, `prune-opd eval`'s problems."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import answer
from prune_opd.config import ParallelConfig, TrainConfig
from prune_opd.config.yaml import load_config

if TYPE_CHECKING:
    from torch import Tensor


def evaluate(models: dict[str, str], config_file: str, problems: int) -> dict[str, Any]:
    """{name: {accuracy, stderr, response_length}} of the directories in `models`, which share one configuration."""
    from prune_opd import platform

    machine = platform.prepare()
    from transformers import AutoTokenizer

    from prune_opd.eval.evaluate import Sampling, make_evaluator
    from prune_opd.eval.run import SEED
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.model import dtype_of
    from prune_opd.rollout.engine import RolloutEngine

    config = load_config(Path(config_file))
    assert isinstance(config, TrainConfig)
    layouts.initialize(ParallelConfig(tensor=1), machine, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(config.student)
    max_len = config.horizon.max_len
    sampling = Sampling(samples=1, max_len=max_len, temperature=1.0, top_p=1.0, seed=SEED)
    evaluator = make_evaluator(tokenizer, config.data, problems, config.rollout.max_prompt_len, sampling)
    engine = RolloutEngine(config.student, config.rollout, max_len, dtype_of(config.precision.params), machine)
    answers = {}
    for name, model_dir in models.items():
        engine.load(read_weights(Path(model_dir)))
        scored = evaluator.run(engine)
        accuracy, length = scored.accuracy, scored.mean_length
        answers[name] = {"accuracy": accuracy.mean, "stderr": accuracy.stderr, "response_length": length}
    engine.close()
    return answers


def read_weights(model_dir: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors.torch import load_file

    for path in sorted(model_dir.glob("*.safetensors")):
        yield from load_file(path).items()


if __name__ == "__main__":
    answer(evaluate)
