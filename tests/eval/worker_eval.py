"""Ranks of test_eval_ranks.py: an evaluation as `prune-opd eval` gives it to each rank.

    torchrun … worker_eval.py MODEL OUT TENSOR_PARALLEL

Rank r writes OUT/rank<r>.json: what its engine is. Rank 0 writes OUT/answers.jsonl and OUT/results.jsonl.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from prune_opd.config import DataConfig
from prune_opd.eval.evaluate import Sampling
from prune_opd.eval.run import SEED, EvalJob, evaluate_model


def main(model: Path, out: Path, tensor_parallel: int) -> None:
    from prune_opd import platform

    platform.prepare()
    from prune_opd.rollout.engine import RolloutEngine

    found: dict[str, Any] = {}
    close = RolloutEngine.close

    def noted(engine: Any) -> None:
        found["tensor_parallel"] = engine.llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size
        found["engines"] = engine.engines
        found["heads"] = engine.llm.collective_rpc(_heads)[0]
        close(engine)

    job = EvalJob(
        str(model),
        (DataConfig(),),
        16,
        Sampling(2, 48, 1.0, 1.0, SEED),
        generations=str(out / "answers.jsonl"),
        results=str(out / "results.jsonl"),
        tensor_parallel=tensor_parallel,
    )
    with mock.patch.object(RolloutEngine, "close", noted):
        evaluate_model(job)
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


def _heads(worker: Any) -> int:
    """Attention heads of the first layer on this rank."""
    return int(worker.model_runner.get_model().model.layers[0].self_attn.num_heads)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
