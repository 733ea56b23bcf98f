"""Process groups: who shares a tensor-parallel shard with whom. One layout for student and teacher so far."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from prune_opd.config import ParallelConfig
from prune_opd.platform import Platform


@dataclass(frozen=True)
class Layout:
    """This rank's place. `tp_group` is None when there is nothing to communicate (TP = 1)."""

    rank: int
    world: int
    tp_rank: int
    tp_size: int
    tp_group: Any
    dp_rank: int
    dp_size: int
    dp_group: Any

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def initialize(parallel: ParallelConfig, platform: Platform, seed: int) -> Layout:
    """Join the job's ranks (torchrun's environment; alone without it) and build megatron's groups.

    Every collective of the job ends with an error after `parallel.timeout_minutes`: a lost rank must not hang the rest.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if platform.is_cpu:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    timeout = timedelta(minutes=parallel.timeout_minutes)
    dist.init_process_group(platform.backend, timeout=timeout)
    world = dist.get_world_size()
    tp_size = parallel.tensor_size(world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp_size, distributed_timeout_minutes=max(1, int(parallel.timeout_minutes))
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return Layout(
        rank=dist.get_rank(),
        world=world,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=tp_size,
        tp_group=parallel_state.get_tensor_model_parallel_group() if tp_size > 1 else None,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_group=parallel_state.get_data_parallel_group(),
    )


def shutdown() -> None:
    """Leave the job in order, so that no rank dies with a connection open."""
    from megatron.core import parallel_state

    if dist.is_initialized():
        dist.barrier()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
