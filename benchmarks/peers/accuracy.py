"""The evaluation of `prune-opd bench peers`: one engine, every saved model, `prune-opd eval`'s problems."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import answer
from prune_opd.config import EvalConfig, TrainConfig
from prune_opd.config.yaml import load_config

if TYPE_CHECKING:
    from torch import Tensor


def evaluate(models: dict[str, str], config_file: str, problems: int) -> dict[str, Any]:
    """{name: {accuracy, stderr, response_length}} of the directories in `models`, which share one configuration."""
    from prune_opd.eval.run import SEED
    from prune_opd.run import prepare

    config = load_config(Path(config_file))
    assert isinstance(config, TrainConfig)
    config = replace(config, evaluation=EvalConfig(problems=problems, seed=SEED))
    run = prepare(config, Path(config_file).with_name("evaluation"), "never")
    answers = {}
    for name, model_dir in models.items():
        run.rollout.engine.load(read_weights(Path(model_dir)))
        scored = run.evaluators[0].run(run.rollout.engine)
        accuracy, length = scored.accuracy, scored.mean_length
        answers[name] = {"accuracy": accuracy.mean, "stderr": accuracy.stderr, "response_length": length}
    run.rollout.engine.close()
    return answers


def read_weights(model_dir: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors.torch import load_file

    for path in sorted(model_dir.glob("*.safetensors")):
        yield from load_file(path).items()


if __name__ == "__main__":
    answer(evaluate)
