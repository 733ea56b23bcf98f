"""The evaluation of `prune-opd bench peers`: one engine goes through every saved model, on `prune-opd eval`'s problems.

torchrun … -m benchmarks.peers.accuracy REQUEST.json ANSWER.json
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prune_opd.cli.worker import run_reported
from prune_opd.config import ParallelConfig, TrainConfig
from prune_opd.config.yaml import load_config
from prune_opd.process import end_with_parent

if TYPE_CHECKING:
    from torch import Tensor


def evaluate(request: Path, answer: Path) -> int:
    """Write {name: {accuracy, stderr, response_length}} of the models in `request`, which share one configuration."""
    from prune_opd import platform

    machine = platform.prepare()
    from transformers import AutoTokenizer

    from prune_opd.eval.evaluate import Sampling, make_evaluator
    from prune_opd.eval.run import SEED
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.model import dtype_of
    from prune_opd.rollout.engine import RolloutEngine

    asked = json.loads(request.read_text(encoding="utf-8"))
    config = load_config(Path(asked["config"]))
    assert isinstance(config, TrainConfig)
    layout = layouts.initialize(ParallelConfig(tensor=1), machine, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(config.student)
    max_len = config.horizon.max_len
    sampling = Sampling(samples=1, max_len=max_len, temperature=1.0, top_p=1.0, seed=SEED)
    evaluator = make_evaluator(tokenizer, config.data, asked["problems"], config.rollout.max_prompt_len, sampling)
    engine = RolloutEngine(config.student, config.rollout, max_len, dtype_of(config.precision.params), machine)
    answers = {}
    for name, model_dir in asked["models"].items():
        engine.load(read_weights(Path(model_dir)))
        scored = evaluator.run(engine)
        accuracy, length = scored.accuracy, scored.mean_length
        answers[name] = {"accuracy": accuracy.mean, "stderr": accuracy.stderr, "response_length": length}
    if layout.is_main:
        answer.write_text(json.dumps(answers), encoding="utf-8")
    engine.close()
    return 0


def read_weights(model_dir: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors.torch import load_file

    for path in sorted(model_dir.glob("*.safetensors")):
        yield from load_file(path).items()


def main() -> int:
    end_with_parent(signal.SIGKILL)
    return run_reported(lambda: evaluate(Path(sys.argv[1]), Path(sys.argv[2])))


if __name__ == "__main__":
    sys.exit(main())
