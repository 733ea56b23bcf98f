"""What a plan starts from: the recipe, both models, their layouts over the ranks, and the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from prune_opd.config import TrainConfig
from prune_opd.model_spec import ModelSpec, model_config
from prune_opd.plan.counts import ParallelSizes
from prune_opd.plan.hardware import GPUS_PER_NODE, Gpu, gpu_named
from prune_opd.plan.lengths import DEFAULT_SHARE, Lengths

WEIGHT_BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True, order=True)
class Stages:
    """The pipeline stages that a rank has: of the student and of the teacher."""

    student: int = 0
    teacher: int = 0


@dataclass(frozen=True)
class Setting:
    config: TrainConfig
    student: ModelSpec
    teacher: ModelSpec
    gpu: Gpu
    world: int  # ranks, one a GPU
    lengths: Lengths

    @property
    def weight_bytes(self) -> int:
        return WEIGHT_BYTES[self.config.precision.params]

    @property
    def teacher_layers(self) -> bool:
        """Whether the teacher computes here; else its rows come from elsewhere."""
        return self.config.teacher_cache.mode != "only" and not self.config.teacher_server.on

    @property
    def teacher_token_bytes(self) -> int:
        """Bytes of what the loss gets of the teacher for a token: a hidden state, or a server's best ids."""
        if self.config.teacher_server.on:
            return 4 * (2 * self.config.teacher_server.top_k + 1)
        return self.teacher.hidden * self.weight_bytes

    @property
    def student_layout(self) -> ParallelSizes:
        parallel = self.config.parallel
        tensor = parallel.tensor_size(self.world)
        ranks = tensor * parallel.pipeline * parallel.context
        return ParallelSizes(tensor, parallel.pipeline, parallel.expert, parallel.context, max(self.world // ranks, 1))

    @property
    def teacher_layout(self) -> ParallelSizes:
        parallel = self.config.parallel
        tensor = parallel.teacher_tensor or parallel.tensor_size(self.world)
        pipeline = parallel.teacher_pipeline or parallel.pipeline
        return ParallelSizes(tensor, pipeline, parallel.teacher_expert, 1, max(self.world // (tensor * pipeline), 1))

    def stages_of(self, rank: int) -> Stages:
        """Ranks are numbered stage by stage (megatron/layout.py)."""
        student, teacher = self.student_layout.pipeline, self.teacher_layout.pipeline
        return Stages(rank * student // self.world, rank * teacher // self.world)

    @property
    def stages(self) -> list[Stages]:
        """All that there are in the job; every rank of the same ones holds as much."""
        first_ranks = (
            self.world * stage // layout.pipeline
            for layout in (self.student_layout, self.teacher_layout)
            for stage in range(layout.pipeline)
        )
        return sorted({self.stages_of(rank) for rank in first_ranks})

    @property
    def responses(self) -> int:
        return self.config.rollout.prompts * self.config.rollout.responses

    @property
    def engines(self) -> int:
        return max(self.world // self.config.rollout.tensor_parallel, 1)

    @property
    def link(self) -> float:
        """Bytes/s of a collective over all ranks: the speed of the slowest link."""
        return self.gpu.nvlink if self.world <= GPUS_PER_NODE else self.gpu.network

    def group_link(self, ranks: int) -> float:
        """Bytes/s of a collective over this many neighbouring ranks."""
        return self.gpu.nvlink if ranks <= GPUS_PER_NODE else self.gpu.network


def setting_of(config: TrainConfig, gpu: str, nodes: int) -> Setting:
    """The setting of a recipe on `nodes` nodes. Raises `ConfigError` for an unknown GPU or model."""
    chosen = gpu_named(gpu)
    dirs = config.model_dirs
    models = {role: model_config(role, directory) for role, directory in dirs.items()}
    specs = {role: ModelSpec.of(model, f"{role} = {dirs[role]!r}") for role, model in models.items()}
    world = nodes * config.parallel.nproc
    longest = config.horizon.max_len
    lengths = Lengths.of(config.planning.response_length or DEFAULT_SHARE * longest, longest)
    return Setting(config, specs["student"], specs["teacher"], chosen, world, lengths)
