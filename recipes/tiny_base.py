"""The tiny base model: learns the ledger from nothing, short problems first, then long ones, on careless solutions.

4 layers of width 128. It comes with the package, as the four that descend from it do. `prune-opd sft tiny_base` (or
`make tiny-models`) makes it anew, in the per-user cache under a digest of these settings. Change a number, and the
recipes look for it and its descendants in the cache.
"""

from dataclasses import replace

from prune_opd.config import CorpusConfig, ModelShape, ParallelConfig, SftConfig, SftStage
from prune_opd.config.paths import config_digest, tiny_model_dir


def tiny_base() -> SftConfig:
    config = SftConfig(
        name="tiny_base",
        output="",
        shape=ModelShape(layers=4, hidden=128, heads=4, kv_heads=2, head_dim=32, ffn=256),
        stages=(
            # 2-10 bookings: the format and the sums, at a constant rate
            SftStage(
                steps=500,
                batch=48,
                lr=3e-3,
                warmup_steps=50,
                schedule="constant",
                corpus=CorpusConfig(min_steps=2, max_steps=10, reverse=0.08, slip=0.004, slip_result=0.03),
                seed=11,
            ),
            # 12-40 bookings: the lengths of the task
            SftStage(
                steps=160,
                batch=24,
                lr=2e-3,
                warmup_steps=50,
                corpus=CorpusConfig(min_steps=12, max_steps=40, reverse=0.08, slip=0.004, slip_result=0.03),
                seed=12,
            ),
        ),
        parallel=ParallelConfig(nproc=2, tensor=1),
    )
    return replace(config, output=str(tiny_model_dir("base", config_digest(config))))
