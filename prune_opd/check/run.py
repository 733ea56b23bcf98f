"""Everything that can be refused before a model is built: files, tokenizers, layouts, lengths, the run directory.

Each check adds one line that names the field, its value and the remedy. Nothing heavy is imported (no torch, megatron,
vLLM or transformers), so `prune-opd check` answers at once, on a login node too. Nothing is written.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_opd.check import precision
from prune_opd.check.elsewhere import cache_folder_problems, server_problems
from prune_opd.check.ends import end_problems
from prune_opd.check.gpu import cache_problems, import_problems
from prune_opd.check.lora import lora_problems
from prune_opd.check.machine import compiler_problems, kv_cache_problems, machine_problems, writable_problems
from prune_opd.check.tokenizer import tokenizer_problems, vocabulary_problems
from prune_opd.check.weights import weight_problems
from prune_opd.config import Fp8Config, SftConfig, TrainConfig
from prune_opd.config.changes import adapter_problem, changes, is_harmless
from prune_opd.config.kernels import kernels_problem
from prune_opd.config.run import extract_problem
from prune_opd.config.teachers import own_names
from prune_opd.data.prompts import doubled_names, source_problem
from prune_opd.errors import ConfigError
from prune_opd.megatron.precision import token_multiple
from prune_opd.model_spec import absent_problem, gguf_problem, model_config, not_built
from prune_opd.plan.layout import layout_problems
from prune_opd.process import has_gpu
from prune_opd.ranks.lease import FILE as LEASE
from prune_opd.track.tensorboard_log import tensorboard_problems

SHOWN_DIFFERENCES = 6


def check_train(
    config: TrainConfig, nproc: int, run_dir: Path | None, resume: str, allow_config_change: bool = False
) -> list[str]:
    """The problems of this run on `nproc` ranks, a line each; empty if there are none.

    resume: auto, never or the path of a checkpoint. run_dir: None leaves the run directory unchecked.
    allow_config_change: a run may go on with settings that would make it another run.
    """
    problems, student = _of_each(config, lambda own: _pair(own, nproc)), _read_model("student", config.student)
    if isinstance(student, _Model) and not has_gpu():
        problems += kv_cache_problems(config, student.config)
    problems += _sources(config) + _reward(config) + cache_folder_problems(config)
    problems += _apex()
    problems += compiler_problems(config.rollout, has_gpu())
    if problem := kernels_problem(config.objective.kernels, has_gpu()):
        problems.append(problem)
    problems += tensorboard_problems(config.track)
    if run_dir is not None:
        problems += _run_dir(config, run_dir, resume, allow_config_change)
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        problems.append(f"--resume {resume}: there is no such checkpoint; give its directory, or auto, or never")
    return problems


def check_everything(
    config: TrainConfig, nproc: int, run_dir: Path | None, resume: str = "auto", allow_config_change: bool = False
) -> list[str]:
    """`check_train`, and what a run looks at once before it takes GPUs: weights, versions, driver, space, prompts."""
    problems = check_train(config, nproc, run_dir, resume, allow_config_change)
    if run_dir is None:  # another rank looks
        return problems
    if not problems:  # of models that fit the run
        problems += _of_each(config, _weights)
    problems += server_problems(config) + machine_problems(config, run_dir, has_gpu(), precision.cuda_of_torch())
    return list(dict.fromkeys(problems + (import_problems() + cache_problems() if has_gpu() else [])))


def check_structure(config: TrainConfig, nproc: int) -> list[str]:
    """The checks that need neither weights nor GPUs, for `nproc` ranks in all: layout, lengths, sizes.

    For a model that is not here its published shape is taken (model_spec.py).
    """
    return _of_each(config, lambda own: _structure(own, nproc))


def _structure(config: TrainConfig, nproc: int) -> list[str]:
    problems, models = [], []
    for role, directory in config.model_dirs.items():
        try:
            models.append(_Model(role, Path(directory), model_config(role, directory)))
            problems += _model_problems(models[-1])
        except ConfigError as error:
            problems.append(str(error))
    problems += _sizes(config, nproc, models)
    if len(models) == 2:
        problems += _vocabulary(*models)
    return problems


def check_sft(config: SftConfig, nproc: int) -> list[str]:
    """The problems of this supervised training; see `check_train`."""
    problems = []
    if config.init is not None:
        problems += _model_problems(_read_model("init", config.init))
    parallel = config.parallel
    found = {"tensor": parallel.tensor_size(nproc)}
    found |= {name: getattr(parallel, name) for name in ("pipeline", "expert", "context", "sequence_parallel")}
    for name, value in found.items():
        alone = "false" if name == "sequence_parallel" else "1"
        if str(value).lower() != alone:
            problems.append(
                f"parallel.{name} = {value}: supervised training is data parallel only; set parallel.{name}={alone}"
            )
    if not config.output:
        problems.append("output = '' is no directory: set output=DIR")
    else:
        problems += writable_problems("output", Path(config.output))
    return problems + _apex()


def check_eval(
    model_dir: Path, tasks: Sequence[str], top_p: float, out: Path | None, extract: str = "box"
) -> list[str]:
    """The problems of evaluating a Hugging Face directory, or a checkpoint, on tasks; see `check_train`."""
    problems: list[str] = []
    if not (model_dir / "state.json").is_file():
        problems += _model_problems(_read_model("MODEL_DIR", str(model_dir)))
    if top_p == 0:
        problems.append("--top-p = 0.0 leaves no token to sample: give more than 0, or --temperature 0 for greedy")
    if problem := extract_problem("--extract", extract):
        problems.append(problem)
    problems += [problem for task in tasks if (problem := source_problem("--task", task))]
    problems += doubled_names("--task", tasks)
    return problems + ([] if out is None else writable_problems("--out", out))


def eval_layout_problems(model_dir: Path, nproc: int, tensor: int) -> list[str]:
    """What --tensor-parallel must divide, a line each: the ranks, and the model's heads where it is a directory."""
    field, problems = f"--tensor-parallel {tensor}", []
    if nproc % tensor:
        problems.append(f"{field} does not divide the {nproc} ranks: give --nproc {tensor}, or a multiple of it")
    model = _read_model("MODEL_DIR", str(model_dir))
    if isinstance(model, _Model) and (heads := int(model.config["num_attention_heads"])) % tensor:
        problems.append(f"{field} does not divide the {heads} attention heads of {model_dir}: give a divisor of them")
    return problems


# ---------------------------------------------------------------------------------------------------- models


def _of_each(config: TrainConfig, check: Callable[[TrainConfig], list[str]]) -> list[str]:
    """The problems with each teacher as if it were the only one, under its own settings' names; each problem once."""
    found = [own_names(name, line) for name, own in config.by_teacher.items() for line in check(own)]
    return list(dict.fromkeys(found))


def _pair(config: TrainConfig, nproc: int) -> list[str]:
    """The problems of student and teacher, each and together."""
    student, teacher = _read_model("student", config.student), _read_model("teacher", config.model_dirs["teacher"])
    models = [model for model in (student, teacher) if isinstance(model, _Model)]
    problems = _model_problems(student) + _model_problems(teacher)
    if len(models) == 2:
        # Different tokenizers often have different sizes too; that would be the same problem said twice.
        shared = min(model.vocab_size for model in models)
        problems += (
            tokenizer_problems(models[0].path, models[1].path) or end_problems(config, shared) or _vocabulary(*models)
        )
    return problems + _sizes(config, nproc, models) + _precision(config, models)


def _weights(config: TrainConfig) -> list[str]:
    dirs = config.model_dirs
    if config.teacher_server.on:  # its weights may be on the server's machine alone
        del dirs["teacher"]
    models = [_read_model(role, directory) for role, directory in dirs.items()]
    found = [weight_problems(model.role, model.path, model.config) for model in models if isinstance(model, _Model)]
    return [problem for problems in found for problem in problems]


@dataclass(frozen=True)
class _Model:
    role: str
    path: Path
    config: dict[str, Any]  # of config.json

    @property
    def positions(self) -> int:
        return int(self.config["max_position_embeddings"])

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])


def _read_model(role: str, directory: str) -> _Model | str:
    """The model's config.json, or the problem with it."""
    path = Path(directory)
    if problem := gguf_problem(role, directory):
        return problem
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            return absent_problem(role, directory, name)
    try:
        return _Model(role, path, model_config(role, directory))
    except ConfigError as error:
        return str(error)


def _model_problems(model: _Model | str) -> list[str]:
    """The problem with reading a model, or what it has that is not built here."""
    if isinstance(model, str):
        return [model]
    problem = not_built(model.config)
    return [f"{model.role} = {str(model.path)!r} has {problem}"] if problem else []


# ---------------------------------------------------------------------------------------------------- sizes


def _sizes(config: TrainConfig, nproc: int, models: list[_Model]) -> list[str]:
    """Problems of layout, lengths and FP8's matrices, which any machine would have."""
    by_role = {model.role: model.config for model in models}
    problems = layout_problems(config, nproc, by_role) + _lengths(config, models) + _candidates(config, models)
    problems += lora_problems(config, by_role.get("student"))
    return problems + _precision_sizes(config, nproc, by_role)


def _lengths(config: TrainConfig, models: list[_Model]) -> list[str]:
    lengths = {"horizon.max_len": config.horizon.max_len}
    if config.evaluation.max_len is not None:
        lengths["evaluation.max_len"] = config.evaluation.max_len
    problems = []
    for field, length in lengths.items():
        for model in models:
            own = model.role == "teacher" and config.data.max_teacher_prompt_len is not None
            limit = "data.max_teacher_prompt_len" if own else "rollout.max_prompt_len"
            prompt = config.teacher_prompt_limit if own else config.rollout.max_prompt_len
            if prompt + length > model.positions and (model.role == "student" or field == "horizon.max_len"):
                room = model.positions - prompt
                remedy = f"set {field} to at most {room}" if room > 0 else f"set a shorter {limit}"
                problems.append(
                    f"{limit} + {field} = {prompt} + {length} is above the {model.positions} positions"
                    f" of the {model.role}: {remedy}"
                )
    return problems


def _candidates(config: TrainConfig, models: list[_Model]) -> list[str]:
    sizes = {"objective.k": config.objective.k}
    if config.gate is not None:
        sizes["gate.k"] = config.gate.k
    if config.weighting.name in ("entropy_aware", "tropd"):
        sizes["weighting.forward_k"] = config.weighting.forward_k
    problems = []
    if config.objective.name == "local_support_matching" and config.objective.k == 1:
        problems.append(
            "objective.k = 1 with objective.name = local_support_matching: on one token both distributions are the "
            "same, so loss and gradient are always 0; set objective.k=32"
        )
    return problems + [
        f"{field} = {k} is above the {model.vocab_size} vocabulary entries of the {model.role}: set at most "
        f"{model.vocab_size}"
        for field, k in sizes.items()
        for model in models
        if k > model.vocab_size
    ]


def _vocabulary(student: _Model, teacher: _Model) -> list[str]:
    """Problems where a model has too few rows for the ids that it will meet."""
    if not_built(student.config) or not_built(teacher.config):
        return []
    problems = []
    for model in (student, teacher):
        problems += vocabulary_problems(model.role, model.path, model.vocab_size, student.vocab_size)
    return problems


def _precision(config: TrainConfig, models: list[_Model]) -> list[str]:
    """Problems of this machine with FP8, in both models and in the rollouts (check/precision.py has the rules)."""
    gpu, student = has_gpu(), next((model.config for model in models if model.role == "student"), None)
    problems = [problem for role, fp8 in _fp8s(config).items() for problem in precision.fp8_problems(role, fp8, gpu)]
    problems += precision.context_problems(config.parallel.context, gpu)
    return problems + precision.rollout_problems(config.rollout, config.precision.params, student, gpu)


def _precision_sizes(config: TrainConfig, nproc: int, models: dict[str, dict[str, Any]]) -> list[str]:
    """Problems of FP8 with sizes and with other settings, which any machine would have."""
    parallel, problems = config.parallel, []
    student = parallel.tensor_size(nproc)
    teacher = parallel.teacher_tensor or student
    cut = teacher > 1 and "moe_intermediate_size" in models.get("teacher", {})  # megatron/teacher.py: with experts
    layouts = {"student": (student, parallel.sequence_parallel), "teacher": (teacher, cut)}
    for role, fp8 in _fp8s(config).items():
        problems += precision.fp8_size_problems(role, fp8, models.get(role), *layouts[role])
        if fp8.on:
            problems += precision.token_problems(parallel.microbatch_tokens, token_multiple(fp8.recipe, *layouts[role]))
    problems += precision.expert_block_problems(config.rollout, models.get("student"))
    problems += precision.parameter_problems(config.precision.student_fp8, parallel.distributed_optimizer)
    return problems + precision.memory_problems(config.memory, _fp8s(config))


def _fp8s(config: TrainConfig) -> dict[str, Fp8Config]:
    return {"student": config.precision.student_fp8, "teacher": config.precision.teacher_fp8}


# ---------------------------------------------------------------------------------------------------- data and packages


def _sources(config: TrainConfig) -> list[str]:
    named = [("data.mixture" if config.data.mixture else "data.source", source) for source in config.data.sources]
    named += [("evaluation.sources", source) for source in config.evaluation.sources]
    problems = [problem for field, source in named if (problem := source_problem(field, source))]
    problems += doubled_names("evaluation.sources", config.evaluation.sources)
    files = [(field, source) for field, source in named if field.startswith("data") and Path(source).exists()]
    if files and not config.evaluation.sources and config.evaluation.problems:
        field, source = files[0]
        problems.append(
            f"evaluation.sources is not set and {field} = {source!r} has no held-out problems:"
            " name another file with answers, or set evaluation.problems=0"
        )
    return problems


def _reward(config: TrainConfig) -> list[str]:
    try:
        config.reward.function()
    except ConfigError as error:
        return [str(error)]
    return []


def _apex() -> list[str]:
    """The package index's `apex` is a web toolkit, and megatron-core would use any `apex` as NVIDIA's."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return []
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if any((folder / part).is_dir() for folder in folders for part in ("normalization", "multi_tensor_apply")):
        return []
    return ["the installed package apex is not NVIDIA's: remove it (pip uninstall apex); nothing here needs it"]


# ---------------------------------------------------------------------------------------------------- the run directory


def _run_dir(config: TrainConfig, run_dir: Path, resume: str, allow_config_change: bool) -> list[str]:
    new = not run_dir.is_dir() or all(path.name.strip(".").startswith(LEASE) for path in run_dir.iterdir())
    if not new and not (run_dir / "config.yaml").is_file():
        return [f"--run-dir {run_dir} holds other files and no config.yaml, so it is no run: choose an empty directory"]
    try:
        differences = [line for line in changes(config, run_dir, resume) if not is_harmless(line)]
    except ConfigError as error:
        return [f"--run-dir {run_dir}: {'; '.join(str(error).splitlines())}; choose another directory"]
    if problem := adapter_problem(differences):
        return [f"--run-dir {run_dir}: {problem}"]
    if differences and not allow_config_change:
        more = len(differences) - SHOWN_DIFFERENCES
        shown = "; ".join(differences[:SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
        return [
            f"--run-dir {run_dir} is a run with other settings ({shown}): choose another directory, or those settings,"
            " or go on with the new ones (--allow-config-change)"
        ]
    checkpoints = run_dir / "checkpoints"
    if resume == "never" and checkpoints.is_dir() and any(checkpoints.iterdir()):
        return [
            f"--resume never: --run-dir {run_dir} already holds checkpoints; take --resume auto to go on,"
            " or another --run-dir to start anew"
        ]
    return writable_problems("--run-dir", run_dir)
