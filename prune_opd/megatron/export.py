"""`prune-opd export`: a checkpoint of any layout as a Hugging Face directory that transformers and vLLM load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prune_opd import platform
from prune_opd.config import ParallelConfig, TrainConfig
from prune_opd.config.yaml import config_from_dict
from prune_opd.data.ends import end_class, write_ends
from prune_opd.errors import UserError


def export_checkpoint(checkpoint: Path, out_dir: Path) -> None:
    """Load the student's weights in one process (the checkpoint reshards) and write them in its training dtype.

    Of a run with adapters the checkpoint has these alone: the student is read from its directory, and they are merged.
    config.json and the tokenizer come from the directory that the run started from; with `objective.ends = class` its
    generation_config.json gets the ends of that class. Raises `UserError` when `checkpoint` is not one.
    """
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.checkpoint import read_state
    from prune_opd.megatron.counted import check_frozen
    from prune_opd.megatron.lora import attach, load_adapters, sharded_adapters
    from prune_opd.megatron.model import build, dtype_of
    from prune_opd.megatron.shards import load_model, load_shards, sharded_model
    from prune_opd.weights.stream import export_hf

    state = read_state(checkpoint)
    config = state["config"]
    settings = config_from_dict(TrainConfig, config, checkpoint)
    absent = [path for path in settings.teacher_paths if not Path(path).is_dir()]
    if settings.objective.ends == "class" and absent:
        raise UserError(
            f"teacher = {absent[0]!r} of the run is not there, and objective.ends = class needs its ends: put "
            "its directory back (config.json and the tokenizer's files are enough)"
        )
    layout = layouts.initialize(ParallelConfig(tensor=1), machine, seed=0)
    dtype = dtype_of(config["precision"]["params"])
    (model,) = build(config["student"], layout.student, dtype, trainable=False, fused_norms=not settings.lora.on)
    shards: Any = sharded_model
    load: Any = load_model
    if settings.lora.on:
        attach([model], settings.lora, settings.seed)
        check_frozen([model], state.get("frozen"), checkpoint, config["student"])
        shards, load = sharded_adapters, load_adapters
    load(model, load_shards({"model": shards(model)}, checkpoint)["model"])
    export_hf([model], config["student"], out_dir, write=True)
    if ends := end_class(settings, model.spec.vocab_size):
        write_ends(out_dir, ends)
    layouts.shutdown()
