"""Which layouts fit the ranks and the models: heads, layers and experts by the ranks that share them. No torch in here.

megatron-core would fail on most of these inside a constructor, on all ranks at once, and run some of them wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prune_opd.config import ParallelConfig, TrainConfig

HfConfig = Mapping[str, Any]


@dataclass(frozen=True)
class _Place:
    """The sizes of one model's layout, and the settings that they come from."""

    role: str
    tensor: int
    tensor_field: str
    pipeline: int
    pipeline_field: str
    expert: int
    expert_field: str


def layout_problems(config: TrainConfig, nproc: int, models: Mapping[str, HfConfig]) -> list[str]:
    """What is wrong with the layout on `nproc` ranks, a line each. models: config.json by role, as far as readable."""
    parallel = config.parallel
    student, teacher = places = _places(parallel, nproc)
    problems = _ranks(parallel, places, nproc)
    for place in places:
        if (model := models.get(place.role)) is not None:
            problems += _model(place, model) + _experts(place, model, nproc)
    if "student" in models:
        problems += _student(parallel, student, models["student"])
    problems += _sequence_parallel(parallel, student)
    problems += _engine(config, nproc, models.get("student"))
    if not problems:
        problems += _batch(config, student, teacher, nproc)
    return problems


def divisors(number: int) -> str:
    """The numbers that would do, as a remedy names them."""
    return ", ".join(str(i) for i in range(1, number + 1) if number % i == 0)


def _places(parallel: ParallelConfig, nproc: int) -> tuple[_Place, _Place]:
    tensor, pipeline = parallel.tensor_size(nproc), parallel.pipeline
    field = f"parallel.tensor = {tensor}"
    if not parallel.tensor:
        field += " (null: all ranks)" if tensor == nproc else " (null: the ranks that are left)"
    student = _Place(
        "student", tensor, field, pipeline, f"parallel.pipeline = {pipeline}", *_expert(parallel, "expert")
    )
    if parallel.teacher_tensor is not None:
        tensor, field = parallel.teacher_tensor, f"parallel.teacher_tensor = {parallel.teacher_tensor}"
    if parallel.teacher_pipeline is not None:
        pipeline = parallel.teacher_pipeline
    name = "pipeline" if parallel.teacher_pipeline is None else "teacher_pipeline"
    name = f"parallel.{name} = {pipeline}"
    return student, _Place("teacher", tensor, field, pipeline, name, *_expert(parallel, "teacher_expert"))


def _expert(parallel: ParallelConfig, name: str) -> tuple[int, str]:
    return getattr(parallel, name), f"parallel.{name} = {getattr(parallel, name)}"


def _ranks(parallel: ParallelConfig, places: tuple[_Place, _Place], nproc: int) -> list[str]:
    """A replica takes tensor * pipeline (* context) ranks, and the job must be made of whole replicas."""
    problems = []
    for place in places:
        context = parallel.context if place.role == "student" else 1
        size = place.tensor * place.pipeline * context
        if nproc % size == 0:
            continue
        if size == place.tensor:
            problem = f"{place.tensor_field} does not divide the {nproc} ranks: choose one of {divisors(nproc)}"
        else:
            shared = f" and parallel.context = {context}" if context > 1 else ""
            problem = (
                f"{place.tensor_field} with {place.pipeline_field}{shared} puts a model on {size} ranks, which does not"
                f" divide the {nproc} ranks: choose sizes with a product of {divisors(nproc)}"
            )
        problems.append(f"{problem}, or another --nproc")
    return list(dict.fromkeys(problems))  # a teacher that lies as the student does is no second problem


def _model(place: _Place, model: HfConfig) -> list[str]:
    """What TP ranks and stages share out evenly. A KV group is never split, so TP stays within their number."""
    heads = int(model["num_attention_heads"])
    shares = {
        "attention heads": heads,
        "key-value heads": int(model.get("num_key_value_heads") or heads),
        "feed-forward columns": int(model.get("intermediate_size") or place.tensor),
    }
    problems = [
        f"{place.tensor_field} does not divide the {count} {name} of the {place.role}: choose one of {divisors(count)}"
        for name, count in shares.items()
        if count % place.tensor
    ]
    layers = int(model.get("num_hidden_layers") or place.pipeline)
    if layers % place.pipeline:
        problems.append(
            f"{place.pipeline_field} does not divide the {layers} layers of the {place.role}:"
            f" choose one of {divisors(layers)}"
        )
    return problems


def _experts(place: _Place, model: HfConfig, nproc: int) -> list[str]:
    """A layer's experts are shared out whole over neighbouring TP and data-parallel ranks of a stage."""
    experts, expert, field = _expert_count(model), place.expert, place.expert_field
    if expert == 1:
        return []
    setting = field.partition(" ")[0]
    if not experts:
        return [f"{field} needs experts, and the {place.role} has none: set {setting}=1"]
    ranks = max(nproc // place.pipeline, 1)
    problems = [
        f"{field} does not divide the {count} {name} of the {place.role}: choose one of {divisors(count)}"
        for name, count in (("experts", experts), ("ranks of a stage", ranks))
        if count % expert
    ]
    if expert % place.tensor:
        problems.append(
            f"{field} is no multiple of {place.tensor_field}, so the ranks that hold all experts would not hold all of"
            f" the rest of the {place.role}: choose a multiple"
        )
    return problems


def _expert_count(model: HfConfig) -> int:
    return int(model.get("num_local_experts") or model.get("num_experts") or 0)  # transformers 5 writes the former


def _student(parallel: ParallelConfig, place: _Place, model: HfConfig) -> list[str]:
    """What only the student has: chunks of a virtual pipeline, and gradients of experts."""
    problems = []
    layers, chunks = int(model.get("num_hidden_layers") or 0), parallel.pipeline * parallel.virtual_pipeline
    if parallel.virtual_pipeline > 1 and layers % parallel.pipeline == 0 and layers % chunks:
        problems.append(
            f"parallel.virtual_pipeline = {parallel.virtual_pipeline} does not divide the {layers // parallel.pipeline}"
            f" layers of a stage of the student: choose one of {divisors(layers // parallel.pipeline)}"
        )
    if _expert_count(model) and place.expert == 1 < place.tensor:
        problems.append(
            f"{place.expert_field} with experts and {place.tensor_field}: nobody adds up the gradients of experts that"
            f" TP ranks share; set parallel.expert to a multiple of {place.tensor}, or parallel.tensor=1"
        )
    if _expert_count(model) and place.tensor > 1 and not parallel.sequence_parallel:
        problems.append(
            f"{place.tensor_field} with experts needs sequence parallelism, or each rank routes all tokens:"
            " set parallel.sequence_parallel=true"
        )
    return problems


def _sequence_parallel(parallel: ParallelConfig, student: _Place) -> list[str]:
    if not parallel.sequence_parallel or student.tensor > 1:
        return []
    return [
        f"parallel.sequence_parallel = True needs tensor parallelism, and {student.tensor_field}:"
        " set parallel.tensor to at least 2, or parallel.sequence_parallel=false"
    ]


def _engine(config: TrainConfig, nproc: int, student: HfConfig | None) -> list[str]:
    engine, problems = config.rollout.tensor_parallel, []
    field = f"rollout.tensor_parallel = {engine}"
    if nproc % engine:
        problems.append(f"{field} does not divide the {nproc} ranks: choose one of {divisors(nproc)}")
    if student is None:
        return problems
    heads = int(student["num_attention_heads"])
    shares = {"attention heads": heads, "feed-forward columns": int(student.get("intermediate_size") or engine)}
    problems += [
        f"{field} does not divide the {count} {name} of the student: choose one of {divisors(count)}"
        for name, count in shares.items()
        if count % engine
    ]
    groups = int(student.get("num_key_value_heads") or heads)
    if heads % engine == 0 and groups % engine and engine % groups:  # vLLM repeats them where the ranks are more
        problems.append(
            f"{field} neither divides the {groups} key-value heads of the student nor is a multiple of them:"
            f" choose one of {divisors(groups)}"
        )
    return problems


def _batch(config: TrainConfig, student: _Place, teacher: _Place, nproc: int) -> list[str]:
    """Every replica needs a response, and every micro-batch of an interleaved pipeline, which come in whole rounds."""
    parallel = config.parallel
    replicas = nproc // (student.tensor * student.pipeline * parallel.context)
    of = f"{replicas} data-parallel replicas"
    needed = replicas
    if parallel.virtual_pipeline > 1:
        needed *= parallel.pipeline
        of += f" with {parallel.pipeline} micro-batches each (parallel.virtual_pipeline)"
    batch, updates = config.rollout.prompts * config.rollout.responses, config.optimizer.updates_per_batch
    if batch < needed:
        return [
            f"rollout.prompts * rollout.responses = {batch} is fewer than the {of}:"
            f" generate at least {needed} responses a step"
        ]
    if batch // updates < needed:
        return [
            f"optimizer.updates_per_batch = {updates} leaves fewer than one of the {batch} responses to each of the"
            f" {of} in an update: set at most {batch // needed}"
        ]
    if batch < (theirs := nproc // (teacher.tensor * teacher.pipeline)):
        return [
            f"rollout.prompts * rollout.responses = {batch} is fewer than the {theirs} replicas of the teacher:"
            f" generate at least {theirs} responses a step, or give the teacher more ranks (parallel.teacher_tensor)"
        ]
    return []
