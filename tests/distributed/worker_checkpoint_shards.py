"""Ranks of test_checkpoint_shards.py: what each rank gathers for a checkpoint, by its format, and what comes back.

    torchrun … worker_checkpoint_shards.py MODELS OUT

Two steps, a checkpoint in either format, one more step (unbroken); a new run loads the checkpoint and does that step
too. Rank r writes OUT/rank<r>.json: {model: {format: findings}}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from prune_opd import platform
from prune_opd.config import ParallelConfig
from prune_opd.errors import UserError
from tests.distributed.tiny_run import build_run, made_up_rollouts, train_config, train_step

# Models and layouts of two replicas; of experts each replica has half.
CASES = {
    "dense": ParallelConfig(tensor=1, distributed_optimizer=True),
    "moe": ParallelConfig(tensor=1, expert=2, distributed_optimizer=True),
}
FORMATS = {"any layout": True, "as held": False}


class Gathered:
    """Counts the bytes that all_gather brings to this rank, and those of a state dict that nobody else holds."""

    def __init__(self) -> None:
        self.received, self.all_gather = 0, dist.all_gather

    def __enter__(self) -> Gathered:
        def counted(into: list[Tensor], *arguments: Any, **settings: Any) -> Any:
            self.received += sum(tensor.nbytes for tensor in into)
            return self.all_gather(into, *arguments, **settings)

        dist.all_gather = counted  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_gather = self.all_gather


class Read:
    """Counts the bytes of shards that this rank reads."""

    def __enter__(self) -> Read:
        self.nbytes, self.read = 0, FileSystemReader.read_data

        def counted(reader: Any, plan: Any, planner: Any) -> Any:
            self.nbytes += sum(reader.storage_data[item.storage_index].length for item in plan.items)
            return self.read(reader, plan, planner)

        FileSystemReader.read_data = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        FileSystemReader.read_data = self.read  # type: ignore[method-assign]


def state_of(trainer: Any) -> list[Tensor]:
    """What a resumed run must have bit by bit: this rank's parameters, and its share of masters and moments."""
    from prune_opd.megatron.offload import optimizer_tensors

    parameters = [parameter for chunk in trainer.chunks for parameter in chunk.parameters()]
    tensors = [*parameters, *optimizer_tensors(trainer.optimizer)]
    return [tensor.detach().clone() for tensor in tensors]


def new_bytes(state: Any, trainer: Any) -> int:
    """Bytes of the state dict's tensors in storages that neither the model nor the optimizer has."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from prune_opd.megatron.offload import optimizer_tensors

    parameters = [parameter for chunk in trainer.chunks for parameter in chunk.parameters()]
    known = {tensor.untyped_storage()._cdata for tensor in (*parameters, *optimizer_tensors(trainer.optimizer))}
    found = {}
    for value in nested_values(state):
        if isinstance(value, ShardedTensor) and isinstance(value.data, Tensor):
            storage = value.data.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(nbytes for key, nbytes in found.items() if key not in known)


def dealt_bytes(state: Any, group: Any) -> int:
    """Bytes that this rank writes, as the replicas agree among themselves."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.utils import _sharded_tensor_shard_id

    found = determine_main_replica_uniform_distribution(state, group)
    assert found is not None
    return sum(
        value.data.nbytes
        for value in nested_values(state)
        if isinstance(value, ShardedTensor)
        and found.main_rank_for_shard.get(_sharded_tensor_shard_id(value)) == group.rank()
    )


def case(models: Path, out: Path, parallel: ParallelConfig, any_layout: bool) -> dict[str, Any]:
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.offload import optimizer_tensors
    from prune_opd.megatron.shards import load_shards
    from prune_opd.rehearse.saving import saving_of

    layout = layouts.arrange(parallel, seed=0)
    run = build_run(train_config(models, 1, parallel=parallel), layout, out)
    for number in (1, 2):
        train_step(run, made_up_rollouts(number))
    with Gathered() as gathered:
        made = new_bytes(run.trainer.sharded_state(loading=False, any_layout=any_layout), run.trainer)
    result: dict[str, Any] = {
        "received": gathered.received,
        "new": made,
        "held": sum(tensor.nbytes for tensor in optimizer_tensors(run.trainer.optimizer)),
    }
    state = run.trainer.sharded_state(loading=False, any_layout=any_layout)
    result["planned"] = saving_of(state, layout.student.groups).written
    result["dealt"] = dealt_bytes(state, layout.student.groups.dp_cp)
    run.checkpoints.save(2, run.trainer, {}, any_layout)
    saved = state_of(run.trainer)
    unbroken = train_step(run, made_up_rollouts(3))  # the child that writes must not see it
    run.checkpoints.finish()
    checkpoint = run.checkpoints.latest()
    result["written"] = written_by_rank(checkpoint)
    resumed = build_run(train_config(models, 1, parallel=parallel), layout, out / "resumed")
    with Read() as alone:  # as if there were no replicas
        load_shards(resumed.trainer.sharded_state(loading=True, any_layout=any_layout), checkpoint)
    with Read() as read:
        resumed.checkpoints.load(checkpoint, resumed.trainer)
    result["weights"] = sum(p.nbytes for chunk in run.trainer.chunks for p in chunk.parameters())
    result["read"], result["read alone"] = read.nbytes, alone.nbytes
    result["loaded bit by bit"] = all(map(torch.equal, saved, state_of(resumed.trainer)))
    resumed.trainer.schedule.load_state_dict({**run.trainer.schedule.state_dict(), "num_steps": 2})
    again = train_step(resumed, made_up_rollouts(3))
    result["same step"] = [again["loss"], again["grad_norm"]] == [unbroken["loss"], unbroken["grad_norm"]]
    result["same weights"] = all(map(torch.equal, state_of(run.trainer), state_of(resumed.trainer)))
    if parallel.expert == 1:
        cut = ParallelConfig(tensor=2, distributed_optimizer=True)
        moved = build_run(train_config(models, 2, parallel=cut), layouts.arrange(cut, seed=0), out / "moved")
        try:
            moved.checkpoints.load(checkpoint, moved.trainer)
            result["in another layout"] = ""
        except UserError as error:
            result["in another layout"] = str(error)
    return result


def written_by_rank(checkpoint: Path) -> list[int]:
    """Bytes of the shards that each rank wrote: the number of the writer is in a file's name."""
    written = [0, 0]
    for path in checkpoint.glob("__*_*.distcp"):
        written[int(path.name.split("_")[2])] += path.stat().st_size
    return written


def main(models: Path, out: Path) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts

    rank = layouts.initialize(ParallelConfig(tensor=1), machine, seed=0).rank
    results = {
        name: {
            form: case(models / name, out / name / form, parallel, any_layout) for form, any_layout in FORMATS.items()
        }
        for name, parallel in CASES.items()
    }
    (out / f"rank{rank}.json").write_text(json.dumps(results))
    layouts.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
