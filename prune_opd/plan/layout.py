"""Whether a layout fits the ranks and the models: what must divide heads, layers, experts and ranks. No torch in here.

On most bad layouts megatron-core would fail inside a constructor, on all ranks at once; some it would run wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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


@dataclass(frozen=True)
class _Demand:
    """A setting (`field`, in words), its value, and how many of something it must divide. role: whose they are."""

    field: str
    size: int
    count: int
    name: str
    role: str = ""


def layout_problems(config: TrainConfig, nproc: int, models: Mapping[str, HfConfig]) -> list[str]:
    """What is wrong with the layout on `nproc` ranks, a line each. models: config.json by role, the readable ones.

    A setting that must divide several numbers has one line, and the sizes that it names divide all of them.
    """
    parallel = config.parallel
    student, teacher = layouts = _layouts(parallel, nproc)
    known = [(layout, models[layout.role]) for layout in layouts if layout.role in models]
    demands = [demand for layout, model in known for demand in _model(layout, model)]
    problems, of_ranks = _whole_replicas(parallel, layouts, nproc, demands)
    problems += _uneven(demands + of_ranks)
    for layout, model in known:
        problems += _experts(layout, model, nproc)
    if "student" in models:
        problems += _student(parallel, student, models["student"])
    problems += _sequence_parallel(parallel, student)
    problems += _engine(config, nproc, models.get("student"))
    if not problems:
        problems += _batch(config, student, teacher, nproc)
    return problems


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


def _divisors(*numbers: int) -> list[int]:
    """What divides all of these numbers."""
    common = math.gcd(*numbers)
    return [i for i in range(1, common + 1) if common % i == 0]


def _uneven(demands: Sequence[_Demand], fits: Callable[[int], bool] = lambda size: True) -> list[str]:
    """A line for each setting that does not divide all it must, with the sizes that do (and fit, if any does)."""
    lines = []
    for field in dict.fromkeys(demand.field for demand in demands):
        own = [demand for demand in demands if demand.field == field]
        missed: dict[str, list[str]] = {}  # by what it is: of which models
        for demand in own:
            if demand.count % demand.size:
                missed.setdefault(f"{demand.count} {demand.name}", []).append(demand.role)
        if missed:
            what = [f"{name} of the {' and the '.join(roles)}" if roles[0] else name for name, roles in missed.items()]
            sizes = _divisors(*(demand.count for demand in own))
            chosen = ", ".join(map(str, [size for size in sizes if fits(size)] or sizes))
            if max(sizes) != math.gcd(*(demand.count for demand in own if demand.role)):  # the ranks leave fewer
                chosen += ", or another --nproc"
            lines.append(f"{field} does not divide the {' and the '.join(what)}: choose one of {chosen}")
    return lines


def _whole_replicas(
    parallel: ParallelConfig, layouts: tuple[_ModelLayout, _ModelLayout], nproc: int, demands: list[_Demand]
) -> tuple[list[str], list[_Demand]]:
    """A replica takes tensor * pipeline (* context) ranks, and the job must be made of whole replicas.

    demands: the models'. Returns the products of sizes that are wrong, a line each, and what the ranks demand of tensor
    and pipeline where the product is right, or tensor is all there is of it.
    """
    problems, of_ranks = [], []
    for layout in layouts:
        context = parallel.context if layout.role == "student" else 1
        size = layout.tensor * layout.pipeline * context
        sizes = {layout.tensor_field: layout.tensor, layout.pipeline_field: layout.pipeline}
        if size == layout.tensor or nproc % size == 0:
            of_ranks += [_Demand(field, own, max(nproc * own // size, 1), "ranks") for field, own in sizes.items()]
            continue
        possible = [1] if context == 1 else _divisors(nproc)
        for field in sizes:
            own_sizes = _divisors(nproc, *(demand.count for demand in demands if demand.field == field))
            possible = [product * one for product in possible for one in own_sizes]
        products = ", ".join(map(str, sorted({product for product in possible if nproc % product == 0})))
        shared = f" and parallel.context = {context}" if context > 1 else ""
        problems.append(
            f"{layout.tensor_field} with {layout.pipeline_field}{shared} puts a model on {size} ranks, which does"
            f" not divide the {nproc} ranks: choose sizes with a product of {products}, or another --nproc"
        )
    return list(dict.fromkeys(problems)), of_ranks  # a teacher with the student's layout would say the same again


def _model(layout: _ModelLayout, model: HfConfig) -> list[_Demand]:
    """What TP ranks and stages must divide evenly. A KV head is never split."""
    heads, role = int(model["num_attention_heads"]), layout.role
    shares = {
        "attention heads": heads,
        "key-value heads": int(model.get("num_key_value_heads") or heads),
        "feed-forward columns": int(model.get("intermediate_size") or 0),
    }
    demands = [_Demand(layout.tensor_field, layout.tensor, count, name, role) for name, count in shares.items()]
    layers = int(model.get("num_hidden_layers") or 0)
    return [*demands, _Demand(layout.pipeline_field, layout.pipeline, layers, "layers", role)]


def _experts(layout: _ModelLayout, model: HfConfig, nproc: int) -> list[str]:
    """Problems with expert parallelism: whole experts go to neighbouring TP and data-parallel ranks of a stage."""
    experts, expert, field = _expert_count(model), layout.expert, layout.expert_field
    if expert == 1:
        return []
    setting = field.partition(" ")[0]
    if not experts:
        return [f"{field} needs experts, and the {layout.role} has none: set {setting}=1"]
    ranks = max(nproc // layout.pipeline, 1)
    demands = [
        _Demand(field, expert, experts, "experts", layout.role),
        _Demand(field, expert, ranks, "ranks of a stage", layout.role),
    ]
    problems = _uneven(demands, lambda size: size % layout.tensor == 0)
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
        problems += _uneven([_Demand(field, chunks, layers, "layers of a stage", "student")])
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
    demands = [_Demand(field, engine, nproc, "ranks")]
    if student is None:
        return _uneven(demands)
    heads, columns = int(student["num_attention_heads"]), int(student.get("intermediate_size") or 0)
    groups = int(student.get("num_key_value_heads") or heads)
    for count, name in ((heads, "attention heads"), (columns, "feed-forward columns")):
        demands.append(_Demand(field, engine, count, name, "student"))

    def fits(size: int) -> bool:
        return groups % size == 0 or size % groups == 0  # vLLM repeats them where the ranks are more

    problems = _uneven(demands, fits)
    if heads % engine == 0 and not fits(engine):
        sizes = ", ".join(str(size) for size in _divisors(nproc, heads, columns) if fits(size))
        problems.append(
            f"{field} neither divides the {groups} key-value heads of the student nor is a multiple of them:"
            f" choose one of {sizes}"
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
