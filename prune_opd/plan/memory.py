"""Bytes on the fullest GPU: resident parts (as in `memory_phases`), a phase's working memory, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from prune_opd.config import memory_phases as phases
from prune_opd.model_spec import ModelSpec
from prune_opd.plan.counts import Count, ParallelSizes, cache_bytes, largest_rank, parameters
from prune_opd.plan.hardware import ENGINE_WORKSPACE, RESERVED
from prune_opd.plan.setting import Setting

STEP = ("sync", "rollout", "teacher", "train")
START = "start"  # everything is built on the device before the first phase
# Matrices [loss chunk × vocabulary] that are alive together, in fp32: both models' logits and what the gradients take.
# In fp32 on a CPU the loss took 2.3 to 2.6 of them beyond its inputs (README); bf16 heads add copies.
LOSS_MATRICES = 4
MASTERS_AND_MOMENTS = 12  # bytes a parameter: fp32 master, Adam's two moments; 8 if the parameters are fp32 themselves
GRADIENT_BYTES = 4  # trainer.py reduces in fp32


@dataclass(frozen=True)
class MemoryPlan:
    """parts: bytes by part. resident, working: by phase. limit: what a run may take of the GPU."""

    parts: dict[str, float]
    resident: dict[str, float]
    working: dict[str, float]
    limit: float
    cache_tokens: float  # capacity of one engine's KV cache

    @property
    def peak_phase(self) -> str:
        return max(self.resident, key=self.total)

    @property
    def peak(self) -> float:
        return self.total(self.peak_phase)

    def total(self, phase: str) -> float:
        return self.resident[phase] + self.working[phase]


def plan_memory(setting: Setting) -> MemoryPlan:
    parts = part_bytes(setting)
    resident = resident_parts(setting)
    work = working_bytes(setting)
    rollout = setting.config.rollout
    cache_value = setting.weight_bytes if rollout.kv_cache_dtype == "auto" else 1  # bytes
    cache = cache_bytes(setting.student, cache_value, rollout.tensor_parallel)
    return MemoryPlan(
        parts=parts,
        resident={phase: sum(parts[part] for part in there) for phase, there in resident.items()}
        | {START: _at_start(setting, parts)},
        working=work | {START: 0.0},
        limit=setting.gpu.memory - RESERVED,
        cache_tokens=max(parts[phases.KV_CACHE], 0) / cache,
    )


def problems(setting: Setting, plan: MemoryPlan) -> list[str]:
    """Why the run does not fit, a line each."""
    found = []
    rollout = setting.config.rollout
    longest = rollout.max_prompt_len + setting.config.horizon.max_len
    if plan.cache_tokens < longest:
        found.append(
            f"rollout.gpu_memory_utilization = {rollout.gpu_memory_utilization} leaves a KV cache of "
            f"{max(plan.cache_tokens, 0):.0f} tokens beside the engine's weights, and one response may take {longest}: "
            "raise it, raise rollout.tensor_parallel, or quantise the rollouts"
        )
    if plan.peak > plan.limit:
        remedies = {
            START: "lower rollout.gpu_memory_utilization, or share the models over more ranks",
            "train": "raise parallel.tensor, set parallel.recompute=full, memory.* offloads, or more nodes",
            "teacher": "raise parallel.teacher_tensor, or set memory.offload_optimizer and memory.sleep_level",
        }
        found.append(
            f"phase {plan.peak_phase} takes {plan.peak / 1e9:.1f} GB of the {plan.limit / 1e9:.1f} GB that a "
            f"{setting.gpu.name} leaves: {remedies.get(plan.peak_phase, 'set memory.sleep_level and memory.offload_*')}"
        )
    return found


def part_bytes(setting: Setting) -> dict[str, float]:
    """Each of `prune_opd.config.memory_phases`'s parts on the fullest rank."""
    student, teacher = setting.student_layout, setting.teacher_layout
    ours, theirs = largest_rank(setting.student, student), largest_rank(setting.teacher, teacher, head=False)
    rollout = setting.config.rollout
    engine = parameters(setting.student) * (1 if rollout.quantization else setting.weight_bytes)
    weights = engine / rollout.tensor_parallel
    return {
        phases.STUDENT: ours.all * setting.weight_bytes,
        phases.GRADIENTS: ours.all * GRADIENT_BYTES,
        phases.OPTIMIZER: optimizer_bytes(setting, ours, student),
        phases.TEACHER: theirs.all * setting.weight_bytes,
        phases.TEACHER_HEAD: _teacher_head(setting, student) * setting.weight_bytes,
        phases.ROLLOUT_WEIGHTS: weights,
        phases.KV_CACHE: setting.gpu.memory * rollout.gpu_memory_utilization - weights - ENGINE_WORKSPACE,
    }


def optimizer_bytes(setting: Setting, count: Count, layout: ParallelSizes) -> float:
    """Masters and moments. The distributed optimizer divides them over the replicas, experts over their own."""
    each = MASTERS_AND_MOMENTS if setting.config.precision.params == "bf16" else MASTERS_AND_MOMENTS - 4
    if not setting.config.parallel.distributed_optimizer:
        return each * count.all
    return each * (count.dense / (layout.replicas * layout.context) + count.experts / layout.expert_replicas)


def resident_parts(setting: Setting) -> dict[str, frozenset[str]]:
    """Parts on the device in each phase of a step, after the first step: the schedule of `memory_phases`."""
    memory, there = setting.config.memory, frozenset(phases.PARTS)
    found = {}
    for phase in (*STEP, *STEP):
        for transition in phases.transitions(memory, there, phase):
            there = transition.resident_after(there)
        found[phase] = there
    return found


def working_bytes(setting: Setting) -> dict[str, float]:
    """What each phase needs beside the resident parts."""
    parallel, student, teacher = setting.config.parallel, setting.student_layout, setting.teacher_layout
    longest = setting.config.rollout.max_prompt_len + setting.config.horizon.max_len
    tokens = max(parallel.microbatch_tokens, longest)  # a row is never cut, even where it is longer than the budget
    hidden = _teacher_hidden(setting, longest)
    forward = tokens * (layer_bytes(setting.teacher, teacher.tensor, False) + 4 * setting.teacher.hidden)
    per_rank = tokens / student.context
    return {
        "sync": 2 * setting.config.rollout.bucket_mb * 2**20,
        "rollout": float(ENGINE_WORKSPACE),
        "teacher": forward + hidden,
        "train": per_rank * _activation_bytes(setting) + loss_bytes(setting) + hidden,
    }


def loss_bytes(setting: Setting) -> float:
    """Bytes of one chunk of the loss: both heads' logits on this rank's part of the vocabulary."""
    tensor, vocab = setting.student_layout.tensor, max(spec.vocab_size for spec in (setting.student, setting.teacher))
    return LOSS_MATRICES * 4 * setting.config.parallel.loss_chunk_tokens * vocab / tensor


def largest_fit(setting: Setting) -> tuple[int, int]:
    """The largest parallel.microbatch_tokens and horizon.max_len that fit, in multiples of 512 tokens; 0 if none does.

    The models' positions bound the horizon too.
    """
    config = setting.config
    positions = min(setting.student.max_positions, setting.teacher.max_positions) - config.rollout.max_prompt_len

    def batch(tokens: int) -> Setting:
        return replace(setting, config=replace(config, parallel=replace(config.parallel, microbatch_tokens=tokens)))

    def length(tokens: int) -> Setting:
        horizon = replace(config.horizon, max_len=tokens, min_len=min(config.horizon.min_len, tokens))
        return replace(setting, config=replace(config, horizon=horizon))

    return _largest(batch, 2**20), _largest(length, positions)


def _largest(make: Callable[[int], Setting], most: int) -> int:
    low, high = 0, most // 512
    while low < high:
        middle = (low + high + 1) // 2
        setting = make(512 * middle)
        low, high = (low, middle - 1) if problems(setting, plan_memory(setting)) else (middle, high)
    return 512 * low


def _at_start(setting: Setting, parts: dict[str, float]) -> float:
    """All parts are built before the first phase, and vLLM wants its share free. Adam's moments come with the first
    step."""
    moments = parts[phases.OPTIMIZER] * (2 / 3 if setting.config.precision.params == "bf16" else 1)
    return sum(parts.values()) - moments + ENGINE_WORKSPACE


def _teacher_head(setting: Setting, student: ParallelSizes) -> float:
    """Parameters of the teacher's output matrix, cut as the student's; 0 where it is the teacher's embedding."""
    teacher = setting.teacher_layout
    if setting.teacher.tied and teacher.tensor == student.tensor and teacher.pipeline == student.pipeline == 1:
        return 0
    return setting.teacher.padded_vocab(student.tensor) / student.tensor * setting.teacher.hidden


def _teacher_hidden(setting: Setting, longest: int) -> float:
    """Bytes of the teacher's last hidden states of a replica's rows, which are kept until they are trained on."""
    rows = -(-setting.responses // setting.student_layout.replicas)
    mean = setting.lengths.mean(setting.config.horizon.max_len)
    return max(rows * mean, longest) * setting.teacher.hidden * setting.weight_bytes


def _activation_bytes(setting: Setting) -> float:
    """Bytes of one token over the layers of the student's first stage, times the micro-batches under way there."""
    parallel, layout, spec = setting.config.parallel, setting.student_layout, setting.student
    layers = spec.layers / layout.pipeline
    kept = layers * kept_bytes(spec, layout.tensor, parallel.sequence_parallel, parallel.recompute)
    again = layer_bytes(spec, layout.tensor, parallel.sequence_parallel) if parallel.recompute == "full" else 0.0
    under_way = layout.pipeline * (1 + (layout.pipeline - 1) / (layout.pipeline * parallel.virtual_pipeline))
    return kept * (under_way if layout.pipeline > 1 else 1) + again + 4 * spec.hidden


def kept_bytes(spec: ModelSpec, tensor: int, sequence_parallel: bool, recompute: str) -> float:
    """Bytes that a layer keeps of a token from its forward to its backward pass, by `parallel.recompute`.

    full: the layer's input. selective: the same as none, since it only recomputes attention's scores, which flash
    attention never stores; attention's output stays as the input of the projection.
    """
    if recompute == "full":
        return 2 * spec.hidden / (tensor if sequence_parallel else 1)
    return layer_bytes(spec, tensor, sequence_parallel)


def layer_bytes(spec: ModelSpec, tensor: int, sequence_parallel: bool) -> float:
    """Bytes that a layer's backward pass needs of a token: bf16, flash attention, no fused activations.

    Counted tensor by tensor as in "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198,
    section 4), and checked against what autograd saves of megatron-core's layers (test_plan_memory.py): inputs and
    outputs of both norms; q, k and v in one piece, rotated q and k, attention's output, cos and sin for q and for k;
    gate and up in one piece, SiLU of gate, a copy of up (megatron-core adds its offset, 0), their product. An expert
    also keeps the product before it is weighted, and its copy of the token.
    """
    shared = tensor if sequence_parallel else 1
    width = spec.heads * spec.head_dim
    groups = spec.kv_heads * spec.head_dim
    attention = (2 * (width + 2 * groups) + 2 * (width + groups) + 2 * width) / tensor + 8 * spec.head_dim
    if spec.moe is not None:
        feed_forward = spec.moe.per_token * (12 * spec.moe.ffn + 2 * spec.hidden) / shared
    else:
        feed_forward = 10 * spec.ffn / tensor
    return 8 * spec.hidden / shared + attention + feed_forward
