"""`prune-opd new`: a recipe for a pair of models, written so that it passes `check` and says why each value is there.

What can be found out is not asked for: shapes and positions from both config.json, tokenizers and ends from the files
beside them, the layout from the planner's search. What nobody can find out, the prompts, is `--data`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prune_opd.check.ends import end_notes
from prune_opd.check.run import check_structure, check_train
from prune_opd.check.tokenizer import tokenizer_problems
from prune_opd.cli.recipe_text import recipe_text
from prune_opd.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    GateConfig,
    HorizonConfig,
    MemoryConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    PlanningConfig,
    PrecisionConfig,
    RolloutConfig,
    TrainConfig,
)
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.paths import data_dir
from prune_opd.config.recipe import load_recipe
from prune_opd.errors import UserError
from prune_opd.model_spec import ModelSpec, model_config
from prune_opd.plan.planner import plan_run
from prune_opd.plan.search import best_layouts
from prune_opd.plan.show import digits

LONGEST, PROMPT = 12288, 1024  # tokens of a response and of a prompt, as in the paper
SMALL_VOCABULARY = 1000  # below it, k = 16 lies in the noise of the tail
# Layouts that a first run should not be the test of are passed over, among so many of the fastest.
PLAIN, TRIED = {"parallel.context=1", "parallel.virtual_pipeline=1"}, 60
SAVING = MemoryConfig(
    sleep_level=2, offload_student=True, offload_gradients=True, offload_optimizer=True, offload_teacher=True
)


@dataclass(frozen=True)
class Pair:
    """Both models of a run, as their files say."""

    student: str
    teacher: str
    positions: int
    vocab_size: int
    ends_differ: bool
    unchecked: tuple[str, ...]  # what could not be looked at from here


def new(
    student: Annotated[str, typer.Option(metavar="DIR", help="A Hugging Face directory.")],
    teacher: Annotated[str, typer.Option(metavar="DIR", help="A Hugging Face directory with the same tokenizer.")],
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of eight GPUs.")] = 1,
    gpu: Annotated[
        Literal["a100", "h100", "h200", "cpu"], typer.Option(help="cpu: two ranks on this machine.")
    ] = "h100",
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE|NAME", help="Prompts.", show_default="$PRUNE_OPD_DATA/dapo-math-17k.jsonl"),
    ] = None,
    evaluation: Annotated[
        str | None, typer.Option(metavar="FILE|NAME", help="Problems with answers.", show_default="none")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The .py file.", show_default="NAME.py here")] = None,
) -> int:
    """Write a recipe for a pair of models: reads both, plans a layout that fits, explains every value."""
    pair = read_pair(student, teacher)
    out = out or Path(f"{recipe_name(student, teacher)}.py")
    if out.suffix != ".py" or not out.stem.isidentifier():
        raise UserError(
            f"--out {out}: the function is named like the file; give a name of letters, digits and _ with .py"
        )
    if out.exists():
        raise UserError(f"--out {out} is there already: choose another name, or remove it")
    source = data or str(data_dir() / "dapo-math-17k.jsonl")
    config = suggest(pair, out.stem, source, evaluation, gpu, nodes)
    world = config.parallel.nproc * nodes
    if problems := check_structure(config, world):
        raise UserError("\n".join(problems))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(recipe_text(config), encoding="utf-8")
    if load_recipe(str(out.absolute())) != config:
        raise RuntimeError(f"{out} does not say what was planned")
    _report(config, pair, out, world)
    return 0


def read_pair(student: str, teacher: str) -> Pair:
    """Raises UserError for a model that is not known or not built here, and for tokenizers that differ."""
    configs = {role: model_config(role, path) for role, path in (("student", student), ("teacher", teacher))}
    specs = [ModelSpec.of(one, f"{role} = {(student, teacher)[i]!r}") for i, (role, one) in enumerate(configs.items())]
    unchecked = [path for path in (student, teacher) if not (Path(path) / "tokenizer.json").is_file()]
    if not unchecked and (problems := tokenizer_problems(Path(student), Path(teacher))):
        raise UserError("\n".join(problems))
    probe = TrainConfig("probe", student, teacher, 1, HorizonConfig("full", max_len=64, min_len=1))
    return Pair(
        student=student,
        teacher=teacher,
        positions=min(spec.max_positions for spec in specs),
        vocab_size=min(spec.vocab_size for spec in specs),
        ends_differ=not unchecked and bool(end_notes(probe)),
        unchecked=tuple(unchecked),
    )


def recipe_name(student: str, teacher: str) -> str:
    """For example qwen3_8b_from_qwen3_32b."""
    words = [re.sub(r"\W+", "_", Path(path).name.lower()).strip("_") or "model" for path in (student, teacher)]
    name = "_from_".join(words)
    return name if name.isidentifier() else f"run_{name}"


def suggest(pair: Pair, name: str, source: str, evaluation: str | None, gpu: Any, nodes: int) -> TrainConfig:
    """The recipe of a pair. Raises UserError if no layout fits the GPUs."""
    prompt = min(PROMPT, pair.positions // 4)
    longest = min(LONGEST, pair.positions - prompt)
    cpu = gpu == "cpu"
    first = max(longest // 6, 1)
    config = TrainConfig(
        name=name,
        student=pair.student,
        teacher=pair.teacher,
        steps=200,
        data=DataConfig(source=source),
        rollout=RolloutConfig(prompts=16 if cpu else 64 * nodes, responses=2 if cpu else 4, max_prompt_len=prompt),
        horizon=HorizonConfig(
            strategy="prune",
            max_len=longest,
            min_len=max(longest // 12, 1),
            init_len=first,
            step=max(longest // 120, 1),
            margin=max(longest // 120, 1),
            rho=0.25,
            increment=max(longest // 24, 1),
            interval=8,
        ),
        gate=GateConfig() if pair.vocab_size >= SMALL_VOCABULARY else GateConfig(k=4, threshold=0.5),
        objective=ObjectiveConfig(ends="class" if pair.ends_differ else "as_is"),
        optimizer=OptimizerConfig(lr=3e-4 if cpu else 1e-6, weight_decay=0.01),
        parallel=ParallelConfig(nproc=2)
        if cpu
        else ParallelConfig(nproc=8, tensor=1, distributed_optimizer=True, recompute="full"),
        precision=PrecisionConfig(params="fp32" if cpu else "bf16"),
        memory=MemoryConfig() if cpu else MemoryConfig(sleep_level=2, offload_gradients=True),
        evaluation=EvalConfig(sources=(evaluation,) if evaluation else (), problems=256 if evaluation else 0),
        checkpoint=CheckpointConfig(every=50),
        planning=PlanningConfig(
            gpu=gpu,
            nodes=nodes,
            response_length=None if cpu else int(0.6 * longest),
            mean_horizon=None if cpu else longest // 2,
        ),
    )
    return config if cpu else laid_out(config, gpu, nodes)


def laid_out(config: TrainConfig, gpu: str, nodes: int) -> TrainConfig:
    """With the fastest layout that fits; where none does, with everything that may leave the GPU between phases."""
    for memory in (config.memory, SAVING):
        candidate = replace(config, memory=memory)
        for found in best_layouts(candidate, gpu, nodes, count=TRIED):
            if set(found.overrides) >= PLAIN:
                return apply_overrides(candidate, list(found.overrides))
    raise UserError(
        f"--nodes {nodes}: no layout of this pair fits {8 * nodes} × {gpu}, not even with all offloads; take more nodes"
    )


def _report(config: TrainConfig, pair: Pair, out: Path, world: int) -> None:
    print(f"wrote {out}: {pair.student} ← {pair.teacher} on {world} ranks")
    if config.planning.gpu != "cpu":
        plan = plan_run(config, config.planning.gpu, config.planning.nodes)
        seconds, hours = digits(plan.planned.total, 1), digits(plan.hours(plan.planned), 1)
        print(f"planned, never measured on a GPU: {seconds} s a step, {hours} h for {config.steps} steps; it fits")
    for path in pair.unchecked:
        print(f"note: {path} has no tokenizer.json here: that both share a tokenizer could not be checked")
    if pair.ends_differ:
        print("note: both end a response with another token: objective.ends=class makes these one outcome")
    problems = [] if config.planning.gpu != "cpu" else check_train(config, world, None, "auto")
    for problem in problems:
        print(f"note: {problem}")
    place = out if out.is_absolute() else f"./{out}"
    print(f"next: prune-opd check {place}{'' if not pair.unchecked else ' --structure'}")
