"""Whether a layout fits the ranks and the models: what must divide heads, layers, experts and ranks. No torch in here.

On most bad layouts megatron-core would fail inside a constructor, on all ranks at once; some it would run wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prune_opd.config import ParallelConfig, TrainConfig

HfConfig = Mapping[str, Any]


@dataclass(frozen=True)
class _ModelLayout:
    """The sizes of one model's layout, and the settings that they come from."""

    role: str
    tensor: int
    tensor_field: str
    pipeline: int
    pipeline_field: str
    expert: int
    expert_field: str


def layout_problems(config: TrainConfig, nproc: int, models: Mapping[str, HfConfig]) -> list[str]:
    """What is wrong with the layout on `nproc` ranks, a line each. models: config.json by role, the readable ones."""
    parallel = config.parallel
    student, teacher = layouts = _layouts(parallel, nproc)
    problems = _ranks(parallel, layouts, nproc)
    for layout in layouts:
        if (model := models.get(layout.role)) is not None:
            problems += _model(layout, model) + _experts(layout, model, nproc)
    if "student" in models:
        problems += _student(parallel, student, models["student"])
    problems += _sequence_parallel(parallel, student)
    problems += _engine(config, nproc, models.get("student"))
    if not problems:
        problems += _batch(config, student, teacher, nproc)
    return problems


def divisors(number: int) -> str:
    """The divisors of a number, as text for an error's remedy."""
    return ", ".join(str(i) for i in range(1, number + 1) if number % i == 0)


def _layouts(parallel: ParallelConfig, nproc: int) -> tuple[_ModelLayout, _ModelLayout]:
    tensor = parallel.tensor_size(nproc)
    field = f"parallel.tensor = {tensor}"
    if not parallel.tensor:
        field += " (null: all ranks)" if tensor == nproc else " (null: the ranks that are left)"
    student = _ModelLayout("student", tensor, field, *_named(parallel, "pipeline"), *_named(parallel, "expert"))
    own_tensor = (tensor, field) if parallel.teacher_tensor is None else _named(parallel, "teacher_tensor")
    own_pipeline = _named(parallel, "pipeline" if parallel.teacher_pipeline is None else "teacher_pipeline")
    return student, _ModelLayout("teacher", *own_tensor, *own_pipeline, *_named(parallel, "teacher_expert"))


def _named(parallel: ParallelConfig, name: str) -> tuple[int, str]:
    return getattr(parallel, name), f"parallel.{name} = {getattr(parallel, name)}"


def _uneven(field: str, size: int, counts: Mapping[str, int]) -> list[str]:
    """A problem for each of the counts, by name, that `size` does not divide."""
    return [
        f"{field} does not divide the {count} {name}: choose one of {divisors(count)}"
        for name, count in counts.items()
        if count % size
    ]


def _ranks(parallel: ParallelConfig, layouts: tuple[_ModelLayout, _ModelLayout], nproc: int) -> list[str]:
    """A replica takes tensor * pipeline (* context) ranks, and the job must be made of whole replicas."""
    problems = []
    for layout in layouts:
        context = parallel.context if layout.role == "student" else 1
        size = layout.tensor * layout.pipeline * context
        if size == layout.tensor:
            problems += [f"{line}, or another --nproc" for line in _uneven(layout.tensor_field, size, {"ranks": nproc})]
        elif nproc % size:
            shared = f" and parallel.context = {context}" if context > 1 else ""
            problems.append(
                f"{layout.tensor_field} with {layout.pipeline_field}{shared} puts a model on {size} ranks, which does"
                f" not divide the {nproc} ranks: choose sizes with a product of {divisors(nproc)}, or another --nproc"
            )
    return list(dict.fromkeys(problems))  # a teacher with the student's layout would say the same again


def _model(layout: _ModelLayout, model: HfConfig) -> list[str]:
    """Problems with what TP ranks and stages must divide evenly. A KV head is never split."""
    heads, of = int(model["num_attention_heads"]), f"of the {layout.role}"
    shares = {
        f"attention heads {of}": heads,
        f"key-value heads {of}": int(model.get("num_key_value_heads") or heads),
        f"feed-forward columns {of}": int(model.get("intermediate_size") or 0),
    }
    layers = {f"layers {of}": int(model.get("num_hidden_layers") or 0)}
    return _uneven(layout.tensor_field, layout.tensor, shares) + _uneven(layout.pipeline_field, layout.pipeline, layers)


def _experts(layout: _ModelLayout, model: HfConfig, nproc: int) -> list[str]:
    """Problems with expert parallelism: whole experts go to neighbouring TP and data-parallel ranks of a stage."""
    experts, expert, field = _expert_count(model), layout.expert, layout.expert_field
    if expert == 1:
        return []
    setting = field.partition(" ")[0]
    if not experts:
        return [f"{field} needs experts, and the {layout.role} has none: set {setting}=1"]
    ranks, of = max(nproc // layout.pipeline, 1), f"of the {layout.role}"
    problems = _uneven(field, expert, {f"experts {of}": experts, f"ranks of a stage {of}": ranks})
    if expert % layout.tensor:
        problems.append(
            f"{field} is no multiple of {layout.tensor_field}, so the ranks that hold all experts would not hold all of"
            f" the rest of the {layout.role}: choose a multiple"
        )
    return problems


def _expert_count(model: HfConfig) -> int:
    return int(model.get("num_local_experts") or model.get("num_experts") or 0)  # transformers 5 writes the former


def _student(parallel: ParallelConfig, layout: _ModelLayout, model: HfConfig) -> list[str]:
    """Problems that only the student can have: chunks of a virtual pipeline, gradients of experts."""
    problems = []
    layers, rest = divmod(int(model.get("num_hidden_layers") or 0), parallel.pipeline)
    if rest == 0:
        chunks, field = _named(parallel, "virtual_pipeline")
        problems += _uneven(field, chunks, {"layers of a stage of the student": layers})
    if _expert_count(model) and layout.expert == 1 < layout.tensor:
        problems.append(
            f"{layout.expert_field} with experts and {layout.tensor_field}: nobody adds up the gradients of experts"
            f" that TP ranks share; set parallel.expert to a multiple of {layout.tensor}, or parallel.tensor=1"
        )
    if _expert_count(model) and layout.tensor > 1 and not parallel.sequence_parallel:
        problems.append(
            f"{layout.tensor_field} with experts needs sequence parallelism, or each rank routes all tokens:"
            " set parallel.sequence_parallel=true"
        )
    return problems


def _sequence_parallel(parallel: ParallelConfig, student: _ModelLayout) -> list[str]:
    if not parallel.sequence_parallel or student.tensor > 1:
        return []
    return [
        f"parallel.sequence_parallel = True needs tensor parallelism, and {student.tensor_field}:"
        " set parallel.tensor to at least 2, or parallel.sequence_parallel=false"
    ]


def _engine(config: TrainConfig, nproc: int, student: HfConfig | None) -> list[str]:
    engine = config.rollout.tensor_parallel
    field = f"rollout.tensor_parallel = {engine}"
    problems = _uneven(field, engine, {"ranks": nproc})
    if student is None:
        return problems
    heads, columns = int(student["num_attention_heads"]), int(student.get("intermediate_size") or 0)
    problems += _uneven(
        field, engine, {"attention heads of the student": heads, "feed-forward columns of the student": columns}
    )
    groups = int(student.get("num_key_value_heads") or heads)
    if heads % engine == 0 and groups % engine and engine % groups:  # vLLM repeats them where the ranks are more
        problems.append(
            f"{field} neither divides the {groups} key-value heads of the student nor is a multiple of them:"
            f" choose one of {divisors(groups)}"
        )
    return problems


def _batch(config: TrainConfig, student: _ModelLayout, teacher: _ModelLayout, nproc: int) -> list[str]:
    """Every replica needs a response; with an interleaved pipeline each of its `pipeline` micro-batches needs one."""
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
