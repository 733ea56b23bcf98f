"""Number formats that are not possible here, a line each: field, value, remedy.

No torch, megatron or vLLM is imported, so `prune-opd check` can refuse on a login node. Everything is checked here,
because megatron-core ignores `fp8=` where Transformer Engine is missing, and accepts recipes that the GPU cannot run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import Any

from prune_opd.config import Fp8Config, MemoryConfig, RolloutConfig
from prune_opd.megatron.precision import BLOCK, GEMM_MULTIPLE

OLDEST_ENGINE = (2, 3)  # Transformer Engine with all three recipes
BLOCKWISE_CUDA = (12, 9)
CPU_QUANTIZATIONS = ("fp8_per_channel",)  # those that vLLM's CPU kernels run; per block they would need AMX
CPU_FP8_HEAD_DIM = 32


def fp8_problems(role: str, fp8: Fp8Config, gpu: bool) -> list[str]:
    """Why this machine cannot run this model in FP8, a line each. role: student | teacher."""
    if not fp8.on:
        return []
    part = f"precision.{role}_fp8"
    field, remedy = f"{part}.format = {fp8.format!r}", f"set {part}.format=null"
    if not gpu:
        return [f"{field} needs a CUDA GPU and there is none here: {remedy}"]
    if missing := transformer_engine_problem():
        return [f"{field} needs Transformer Engine, and {missing}: install it, or {remedy}"]
    cuda = cuda_of_torch()
    if fp8.recipe == "blockwise" and cuda is not None and cuda < BLOCKWISE_CUDA:
        return [
            f"{part}.recipe = 'blockwise' needs CUDA 12.9 and this torch has {_dotted(cuda)}: "
            f"install a torch for CUDA 12.9 or later, or set {part}.recipe=tensorwise"
        ]
    return []


def fp8_size_problems(
    role: str, fp8: Fp8Config, model: dict[str, Any] | None, tensor: int, sequence_parallel: bool
) -> list[str]:
    """Why no machine can have this model's matrices in FP8, a line each. model: its config.json, None if unreadable."""
    if not fp8.on or model is None:
        return []
    part = f"precision.{role}_fp8"
    field, remedy = f"{part}.format = {fp8.format!r}", f"set {part}.format=null"
    problems = []
    multiple = BLOCK if fp8.recipe == "blockwise" and sequence_parallel and tensor > 1 else GEMM_MULTIPLE
    tensor_field = "parallel.tensor" if role == "student" else "parallel.teacher_tensor"
    for name, size in matrix_sizes(model, tensor, tensor_field).items():
        needed = multiple if name == "hidden_size" else GEMM_MULTIPLE
        if size % needed:
            other = f"{tensor_field} or model" if tensor_field in name else "model"
            problems.append(
                f"{field} needs matrices whose sizes are multiples of {needed}, and {name} = {size} of the {role} "
                f"is none: choose another {other}, or {remedy}"
            )
    layers = int(model.get("num_hidden_layers", 0))
    for end in ("first_layers_bf16", "last_layers_bf16"):
        if getattr(fp8, end) > layers:
            problems.append(
                f"{part}.{end} = {getattr(fp8, end)} is above the {layers} layers of the {role}: set at most {layers}"
            )
    return problems


def matrix_sizes(model: dict[str, Any], tensor: int, field: str) -> dict[str, int]:
    """Dimensions of a layer's matrix products on one of `tensor` ranks, by name. field: the name of that setting.

    Sizes that `tensor` does not divide are left out: another check refuses them.
    """
    hidden, heads = int(model["hidden_size"]), int(model["num_attention_heads"])
    groups = int(model.get("num_key_value_heads") or heads)
    split = {
        "heads × head_dim": heads * head_dim(model),
        "(heads + 2 × key-value heads) × head_dim": (heads + 2 * groups) * head_dim(model),
        "intermediate_size": int(model["intermediate_size"]),
    }
    on_rank = "" if tensor == 1 else f" / {field} {tensor}"
    sizes = {f"{name}{on_rank}": size // tensor for name, size in split.items() if size % tensor == 0}
    if "moe_intermediate_size" in model:
        sizes["moe_intermediate_size"] = int(model["moe_intermediate_size"])  # experts are never cut
    return {"hidden_size": hidden, **sizes}


def head_dim(model: dict[str, Any]) -> int:
    """The head dimension of a config.json, which may leave it out where it is hidden / heads."""
    return int(model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"])


def token_problems(microbatch_tokens: int, multiple: int) -> list[str]:
    """Micro-batches are padded to a multiple of tokens. The budget must be one too, or a full one would exceed it."""
    if microbatch_tokens % multiple == 0:
        return []
    return [
        f"parallel.microbatch_tokens = {microbatch_tokens} is no multiple of the {multiple} tokens that FP8 needs in "
        f"this layout: set parallel.microbatch_tokens={-(-microbatch_tokens // multiple) * multiple}"
    ]


def context_problems(context: int, gpu: bool) -> list[str]:
    """Context parallelism needs Transformer Engine: megatron-core's own attention would give wrong results."""
    if context == 1:
        return []
    field, remedy = f"parallel.context = {context}", "set parallel.context=1"
    if missing := transformer_engine_problem():
        return [f"{field} needs Transformer Engine, and {missing}: install it, or {remedy}"]
    return [] if gpu else [f"{field} needs a CUDA GPU and there is none here: {remedy}"]


def parameter_problems(student: Fp8Config, distributed_optimizer: bool) -> list[str]:
    """FP8 parameters need the distributed optimizer: only there megatron-core writes fp32 masters back into them."""
    if not (student.on and student.param) or distributed_optimizer:
        return []
    return [
        "precision.student_fp8.param = True needs parallel.distributed_optimizer = True, and it is False: "
        "set that, or precision.student_fp8.param=false"
    ]


def memory_problems(memory: MemoryConfig, fp8s: dict[str, Fp8Config]) -> list[str]:
    """The offload does not handle FP8 parameters, which are several tensors that look like one."""
    settings = {"student": memory.offload_student, "teacher": memory.offload_teacher}
    return [
        f"memory.offload_{role} = True does not go with precision.{role}_fp8.param = True: set one of them to false"
        for role, offload in settings.items()
        if offload and fp8s[role].on and fp8s[role].param
    ]


def rollout_problems(rollout: RolloutConfig, params: str, model: dict[str, Any] | None, gpu: bool) -> list[str]:
    """Why vLLM cannot quantise the student here, a line each."""
    problems = []
    if (method := rollout.quantization) is not None:
        field, remedy = f"rollout.quantization = {method!r}", "set rollout.quantization=null"
        if params != "bf16":
            problems.append(f"{field} needs precision.params = bf16, and it is {params!r}: set that, or {remedy}")
        if not gpu and method not in CPU_QUANTIZATIONS:
            problems.append(
                f"{field} needs a CUDA GPU and there is none here: "
                f"choose {' or '.join(CPU_QUANTIZATIONS)}, which vLLM also has on the CPU, or {remedy}"
            )
        elif not gpu and model is not None and model.get("model_type") == "qwen3_moe":
            problems.append(f"{field} is for dense models on the CPU, and the student has experts: {remedy}")
    if rollout.kv_cache_dtype != "auto" and not gpu:
        field, remedy = f"rollout.kv_cache_dtype = {rollout.kv_cache_dtype!r}", "set rollout.kv_cache_dtype=auto"
        if not has_wide_vectors():
            problems.append(f"{field} needs a CPU with AVX-512 or AMX, or a GPU: {remedy}")
        if model is not None and head_dim(model) % CPU_FP8_HEAD_DIM:
            problems.append(
                f"{field} needs on the CPU a head_dim that is a multiple of {CPU_FP8_HEAD_DIM}, and the student's is "
                f"{head_dim(model)}: {remedy}"
            )
    return problems


def expert_block_problems(rollout: RolloutConfig, model: dict[str, Any] | None) -> list[str]:
    """vLLM never counts experts that end inside a block as loaded, and a reload would keep every bucket."""
    if rollout.quantization != "fp8_per_block" or model is None or "moe_intermediate_size" not in model:
        return []
    size, tensor = int(model["moe_intermediate_size"]), rollout.tensor_parallel
    if size % tensor == 0 and size // tensor % BLOCK == 0:
        return []
    fitting = [
        ranks for ranks in range(1, tensor) if tensor % ranks == 0 and size % ranks == 0 and size // ranks % BLOCK == 0
    ]
    smaller = f"rollout.tensor_parallel={max(fitting)}, or " if fitting else ""
    return [
        f"rollout.quantization = 'fp8_per_block' needs experts in whole blocks of {BLOCK}, and moe_intermediate_size = "
        f"{size} / rollout.tensor_parallel = {tensor} of the student is no multiple of it: set {smaller}"
        "rollout.quantization=fp8_per_tensor"
    ]


def transformer_engine_problem() -> str | None:
    """What is wrong with Transformer Engine here. None: megatron-core would find it, and it has every recipe.

    It is looked up, not imported. Without its PyTorch extension the package breaks the import of megatron-core.
    """
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None:
        return "it is not installed"
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    extension = importlib.util.find_spec("transformer_engine_torch") is not None or any(
        next(folder.glob("**/transformer_engine_torch*.so"), None) for folder in folders
    )
    if not extension or not any((folder / "pytorch").is_dir() for folder in folders):
        return "the installed one has no PyTorch extension (transformer-engine-torch)"
    try:
        version = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return "the installed one has no version: it was not installed by pip"
    if _version(version) < OLDEST_ENGINE:
        return f"version {version} is older than {_dotted(OLDEST_ENGINE)}"
    return None


def cuda_of_torch() -> tuple[int, ...] | None:
    """The CUDA version that torch was built for, read from its files; None for a CPU build."""
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        text = (Path(folder) / "version.py").read_text(encoding="utf-8")
        if found := re.search(r"^cuda\b[^=]*= *['\"]([\d.]+)['\"]", text, re.MULTILINE):
            return _version(found[1])
    return None


def has_wide_vectors() -> bool:
    """Whether this CPU can have an FP8 KV cache in vLLM: AVX-512 or AMX."""
    cpu = Path("/proc/cpuinfo")
    flags = set(cpu.read_text(encoding="utf-8").split()) if cpu.exists() else set()
    return bool(flags & {"avx512f", "amx_tile"})


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
