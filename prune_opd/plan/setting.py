"""What a plan starts from: the recipe, both models, their layouts over the ranks, and the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from prune_opd.config import TrainConfig
from prune_opd.config.teachers import by_source, teacher_of_source
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
    """With several teachers `teacher` is the first of them, and `of` has a setting for each.

    In these it is the only one, and has its share of the responses.
    """

    config: TrainConfig
    student: ModelSpec
    teacher: ModelSpec
    gpu: Gpu
    world: int  # ranks, one a GPU
    lengths: Lengths
    of: Mapping[str, Setting] = field(default_factory=dict)

    @property
    def teachers(self) -> tuple[str, ...]:
        """The names of several."""
        return tuple(self.of)

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
        return sorted({self.stages_of(rank) for rank in self.first_ranks})

    @property
    def first_ranks(self) -> list[int]:
        """The first rank of each stage of each model: others hold as much as one of these."""
        layouts = [self.student_layout, *(one.teacher_layout for one in self.of.values() or (self,))]
        return sorted({self.world * stage // one.pipeline for one in layouts for stage in range(one.pipeline)})

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
    if config.teachers:
        return _of_several(config, gpu, nodes)
    chosen = gpu_named(gpu)
    dirs = config.model_dirs
    models = {role: model_config(role, directory) for role, directory in dirs.items()}
    specs = {role: ModelSpec.of(model, f"{role} = {dirs[role]!r}") for role, model in models.items()}
    world = nodes * config.parallel.nproc
    longest = config.horizon.max_len
    lengths = Lengths.of(config.planning.response_length or DEFAULT_SHARE * longest, longest)
    return Setting(config, specs["student"], specs["teacher"], chosen, world, lengths)


def resized(setting: Setting, world: int) -> Setting:
    """The same on another number of ranks."""
    return replace(setting, world=world, of={name: resized(one, world) for name, one in setting.of.items()})


def shares(config: TrainConfig) -> dict[str, float]:
    """The share of the prompts that each of several teachers has: by the data's weights, even where rows decide."""
    taught, sources = by_source(config.teachers), config.data.sources
    weights = config.data.weights or (1.0,) * len(sources)
    found = dict.fromkeys(config.teachers, 0.0)
    for source, weight in zip(sources, weights, strict=True):
        name = None if config.data.teacher_column else teacher_of_source(taught, source)
        for one in [name] if name else list(found):
            found[one] += weight / sum(weights) / (1 if name else len(found))
    return found


def _of_several(config: TrainConfig, gpu: str, nodes: int) -> Setting:
    of = {}
    for name, share in shares(config).items():
        own, rollout = config.of_teacher(name), config.rollout
        prompts = max(1, round(share * rollout.prompts))
        own = replace(own, horizon=config.horizon, rollout=replace(rollout, prompts=prompts))
        of[name] = setting_of(own, gpu, nodes)
    first = next(iter(of.values()))
    return replace(first, config=config, of=of)
