"""`prune-opd export`: a checkpoint of any layout as a Hugging Face directory that transformers and vLLM load."""

from __future__ import annotations

from pathlib import Path

from prune_opd import platform
from prune_opd.config import ParallelConfig


def export_checkpoint(checkpoint: Path, out_dir: Path) -> None:
    """Load the student's weights in one process (the checkpoint reshards) and write them in its training dtype.

    config.json and the tokenizer come from the directory that the run started from. Raises `UserError` when
    `checkpoint` is not one.
    """
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.checkpoint import load_model, load_shards, read_state
    from prune_opd.megatron.model import build, dtype_of
    from prune_opd.weights.stream import export_hf

    config = read_state(checkpoint)["config"]
    layout = layouts.initialize(ParallelConfig(tensor=1), machine, seed=0)
    dtype = dtype_of(config["precision"]["params"])
    (model,) = build(config["student"], layout.student, dtype, trainable=False)
    load_model(model, load_shards({"model": model.sharded_state_dict()}, checkpoint)["model"])
    export_hf([model], config["student"], out_dir, write=True)
    layouts.shutdown()
