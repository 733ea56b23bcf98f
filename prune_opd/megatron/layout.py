"""Process groups: where a model's shards lie, and this rank's place among them.

Ranks are numbered as megatron-core does it: tensor parallel neighbours first, then context parallel ones, data parallel
replicas and pipeline stages. With TP 2 on 8 ranks and 2 stages, ranks 0 1 hold one stage of one replica, ranks 4 5 its
next stage.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from prune_opd.config import ParallelConfig
from prune_opd.platform import Platform
from prune_opd.ranks.gloo import share_device


@dataclass(frozen=True)
class ModelLayout:
    """Where one model lies. `groups` is megatron's ProcessGroupCollection; vp counts chunks of layers per stage.

    An expert is never cut: the ep ranks that share a layer's experts are neighbours among the TP and data-parallel
    ranks of a stage. (Cut experts need all-gathers of unequal parts, which gloo does not have.)
    """

    tp: int
    pp: int
    vp: int
    ep: int
    cp: int
    sequence_parallel: bool
    groups: Any

    @property
    def dp(self) -> int:
        return self.groups.dp.size()

    @property
    def dp_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def is_last_stage(self) -> bool:
        """Where the hidden states come out and the loss is computed."""
        return self.groups.pp.rank() == self.pp - 1

    @property
    def cp_rank(self) -> int:
        return self.groups.cp.rank() if self.cp > 1 else 0

    @property
    def cp_group(self) -> Any:
        """None when the tokens are not shared."""
        return self.groups.cp if self.cp > 1 else None

    @property
    def microbatch_multiple(self) -> int:
        """What the number of micro-batches must be a multiple of: an interleaved pipeline takes them in such groups."""
        return self.pp if self.vp > 1 else 1

    @property
    def row_multiple(self) -> int:
        """What the tokens of a row must be a multiple of: context-parallel ranks get two pieces of it each."""
        return 2 * self.cp if self.cp > 1 else 1

    def batch_multiple(self, multiple: int) -> int:
        """What the tokens of a micro-batch are a multiple of, over all ranks that share it; `multiple`: on each."""
        return math.lcm(multiple * self.cp, self.row_multiple)

    def last_stage_ranks(self, dp_rank: int) -> list[int]:
        """The job's ranks that hold a replica's last stage."""
        size = self.cp * self.tp
        first = ((self.pp - 1) * self.dp + dp_rank) * size
        return list(range(first, first + size))

    @property
    def tp_group(self) -> Any:
        """None when there is nothing to communicate."""
        return self.groups.tp if self.tp > 1 else None


@dataclass(frozen=True)
class Layout:
    """This rank's place in the job. The data is divided as the student's layout says."""

    rank: int
    world: int
    student: ModelLayout
    teacher: ModelLayout

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def counts(self) -> bool:
        """Whether what the loss sums up on this rank counts for the job: each token is summed up once."""
        return self.student.is_last_stage and self.student.groups.tp.rank() == 0

    @property
    def reports(self) -> bool:
        """Whether what the gate saw on this rank counts: context-parallel ranks all know it of all their tokens."""
        return self.counts and self.student.cp_rank == 0


def initialize(parallel: ParallelConfig, platform: Platform, seed: int) -> Layout:
    """Join the job's ranks (torchrun's environment; alone without it) and build megatron's groups.

    Every collective of the job ends with an error after `parallel.timeout_minutes`: a lost rank must not hang the rest.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if platform.is_cpu:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        share_device()
    dist.init_process_group(platform.backend, timeout=timedelta(minutes=parallel.timeout_minutes))
    return arrange(parallel, seed)


def arrange(parallel: ParallelConfig, seed: int) -> Layout:
    """Build megatron's groups over the ranks that have joined; again, after another layout, if need be."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    world = dist.get_world_size()
    tp = parallel.tensor_size(world)
    parallel_state.destroy_model_parallel()
    _leave_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=max(1, int(parallel.timeout_minutes)),
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    student = ModelLayout(
        tp=tp,
        pp=parallel.pipeline,
        vp=parallel.virtual_pipeline,
        ep=parallel.expert,
        cp=parallel.context,
        sequence_parallel=parallel.sequence_parallel,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return Layout(rank=dist.get_rank(), world=world, student=student, teacher=_teacher_layout(parallel, student))


def _leave_groups() -> None:
    """Close what an earlier layout has opened: gloo keeps threads for each group, thousands after forty layouts."""
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def with_teacher(layout: Layout, parallel: ParallelConfig) -> Layout:
    """The same job with another teacher's layout. Collective: it may build groups."""
    return replace(layout, teacher=_teacher_layout(parallel, layout.student))


def _teacher_layout(parallel: ParallelConfig, student: ModelLayout) -> ModelLayout:
    """The student's groups where they serve the teacher too. Forward only: no virtual pipeline.

    The teacher itself turns sequence parallelism on, where it has experts.
    """
    tp, pp = parallel.teacher_tensor or student.tp, parallel.teacher_pipeline or student.pp
    ep = parallel.teacher_expert
    same = (tp, pp, ep, 1) == (student.tp, student.pp, student.ep, student.cp)
    groups = student.groups if same else _own_groups(tp, pp, ep, parallel.timeout_minutes)
    return ModelLayout(tp=tp, pp=pp, vp=1, ep=ep, cp=1, sequence_parallel=False, groups=groups)


def _own_groups(tp: int, pp: int, ep: int, timeout_minutes: float) -> Any:
    """Groups for a second model over all ranks, numbered like those of `parallel_state`.

    What a forward pass needs is there; the groups of gradients and optimizers are not.
    """
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.process_groups_config import ProcessGroupCollection

    per_stage, timeout = dist.get_world_size() // pp, timedelta(minutes=timeout_minutes)
    grid = HyperCommGrid([tp, 1, per_stage // tp, pp], ["tp", "cp", "dp", "pp"])
    of_experts = HyperCommGrid([1, ep, per_stage // ep, pp], ["tp", "ep", "dp", "pp"])

    def group(grid: Any, *dims: str) -> Any:
        return grid.create_pg(list(dims), timeout=timeout)

    groups = ProcessGroupCollection()
    groups.tp, groups.cp, groups.pp, groups.dp = (group(grid, dim) for dim in ("tp", "cp", "pp", "dp"))
    groups.dp_cp = groups.dp
    groups.mp, groups.tp_cp, groups.tp_dp_cp = (
        group(grid, *dims) for dims in (("tp", "pp"), ("tp", "cp"), ("tp", "cp", "dp"))
    )
    groups.expt_tp, groups.ep, groups.expt_dp = (group(of_experts, dim) for dim in ("tp", "ep", "dp"))
    groups.tp_ep, groups.tp_ep_pp = group(of_experts, "tp", "ep"), group(of_experts, "tp", "ep", "pp")
    groups.embd = groups.pos_embd = None
    for ranks in grid.get_rank_enum("pp"):
        ends = dist.new_group(sorted({ranks[0], ranks[-1]}), timeout=timeout)  # tied embeddings start out equal
        if dist.get_rank() in ranks:
            groups.embd = ends
    return groups


def shutdown() -> None:
    """Leave the job in order, so that no rank dies with a connection open."""
    from megatron.core import parallel_state

    if dist.is_initialized():
        dist.barrier()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
