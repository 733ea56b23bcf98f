"""Bytes on the fullest GPU: resident parts (as in `memory_phases`), a phase's working memory, and whether it fits."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from prune_opd.config import memory_phases as phases
from prune_opd.config.teacher import EMA
from prune_opd.model_spec import ModelSpec
from prune_opd.plan.adapters import adapters_on_rank, kept_change, merging_bytes, trained
from prune_opd.plan.counts import Count, ParallelSizes, cache_bytes, largest_rank, on_rank, parameters
from prune_opd.plan.hardware import ENGINE_WORKSPACE, RESERVED
from prune_opd.plan.setting import Setting, Stages

STEP = ("sync", "rollout", "teacher", "train")
AVERAGE = "average"  # after the update, where the teacher is the student's moving average
INFLIGHT = "inflight"  # what the rollout is where the teacher looks at the responses on the way
START = "start"  # student, optimizer and teacher are built first, then the engine, while what may move is away
# Matrices [loss chunk × vocabulary] that are alive together, in fp32, by objective.kernels: both models' logits, and
# scratch as large for the sums over the vocabulary (which a CPU makes a few rows at a time). With our own kernels there
# are no such sums, and the student's gradient is one in bf16 beside the logits.
LOSS_MATRICES = {"torch": 4, "triton": 2.5}
TOPK_BLOCK = 64  # ids of which the loss looks at the largest first
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
    """That of the fullest rank: stages of a pipeline hold different parts, and micro-batches under way."""
    return max((_plan(setting, rank) for rank in setting.first_ranks), key=lambda plan: plan.peak)


def _plan(setting: Setting, rank: int) -> MemoryPlan:
    parts, work = parts_of_rank(setting, rank), _work_of_rank(setting, rank)
    resident = resident_parts(setting)
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


def parts_of_rank(setting: Setting, rank: int) -> dict[str, float]:
    """Each of the run's parts on a rank; of several teachers each has one, and all heads are one."""
    if not setting.of:
        return part_bytes(setting, setting.stages_of(rank))
    each = {name: part_bytes(one, one.stages_of(rank)) for name, one in setting.of.items()}
    own = {phases.part_of(name): parts[phases.TEACHER] for name, parts in each.items()}
    found = next(iter(each.values())) | own
    found[phases.TEACHER_HEAD] = sum(parts[phases.TEACHER_HEAD] for parts in each.values())
    return {part: found[part] for part in phases.parts_of(setting.teachers)}


def _work_of_rank(setting: Setting, rank: int) -> dict[str, float]:
    """What each phase needs beside the parts. With several teachers the hidden states of those before stay."""
    if not setting.of:
        return working_bytes(setting, setting.stages_of(rank))
    each = {name: working_bytes(one, one.stages_of(rank)) for name, one in setting.of.items()}
    held = {name: _trained_on(one) for name, one in setting.of.items()}
    trains = setting.student_layout.pipeline - 1 == setting.stages_of(rank).student
    found: dict[str, float] = {}
    for number, name in enumerate(each):
        for label, phase, turn in entries(setting):
            others = list(each)[:number] if phase == "teacher" else [other for other in each if other != name]
            kept = sum(held[other] for other in others) if trains and phase in ("teacher", "train") else 0.0
            if turn in ("", name):
                found[label] = max(found.get(label, 0.0), each[name][phase] + kept)
    return found


def _trained_on(setting: Setting) -> float:
    longest = setting.config.rollout.max_prompt_len + setting.config.horizon.max_len
    return hidden_bytes(setting, setting.responses * setting.lengths.mean(setting.config.horizon.max_len), longest)[1]


def part_bytes(setting: Setting, stages: Stages) -> dict[str, float]:
    """Each of `prune_opd.config.memory_phases`'s parts on a rank of these stages."""
    student = setting.student_layout
    ours = on_rank(setting.student, student, stages.student)
    theirs = on_rank(setting.teacher, setting.teacher_layout, stages.teacher, head=False)
    head = _teacher_head(setting, student) if stages.student == student.pipeline - 1 else 0
    rollout = setting.config.rollout
    engine = parameters(setting.student) * (1 if rollout.quantization else setting.weight_bytes)
    weights = engine / rollout.tensor_parallel
    return {
        phases.STUDENT: (ours.all + adapters_on_rank(setting)) * setting.weight_bytes,
        phases.GRADIENTS: trained(setting, ours).all * GRADIENT_BYTES,
        phases.OPTIMIZER: optimizer_bytes(setting, trained(setting, ours), student),
        phases.TEACHER: theirs.all * setting.weight_bytes * setting.teacher_layers,
        phases.TEACHER_HEAD: head * setting.weight_bytes,
        phases.ROLLOUT_WEIGHTS: weights,
        phases.KV_CACHE: setting.gpu.memory * rollout.gpu_memory_utilization - weights - ENGINE_WORKSPACE,
    }


def optimizer_bytes(setting: Setting, count: Count, layout: ParallelSizes) -> float:
    """Masters and moments. The distributed optimizer divides them over the replicas, experts over their own."""
    each = MASTERS_AND_MOMENTS if setting.config.precision.params == "bf16" else MASTERS_AND_MOMENTS - 4
    if not setting.config.parallel.distributed_optimizer:
        return each * count.all
    return each * (count.dense / (layout.replicas * layout.context) + count.experts / layout.expert_replicas)


def phases_of(setting: Setting) -> tuple[str, ...]:
    """The phases of a step, in order."""
    watched, steps = setting.config.rollout.inflight.on, STEP + (AVERAGE,) * (setting.config.teacher == EMA)
    return tuple(INFLIGHT if phase == "rollout" and watched else phase for phase in steps)


def entries(setting: Setting) -> list[tuple[str, str, str]]:
    """(label, phase, whose turn) of a step, in order: several teachers take turns in the phases that need them."""
    return [
        (f"{phase} {turn}".rstrip(), phase, turn)
        for phase in phases_of(setting)
        for turn in (setting.teachers if phases.TEACHER in phases.NEEDS[phase] else ()) or ("",)
    ]


def resident_parts(setting: Setting) -> dict[str, frozenset[str]]:
    """Parts on the device in each phase of a step, after the first step: the schedule of `memory_phases`."""
    memory, teachers, step = setting.config.memory, setting.teachers, entries(setting)
    there, found = frozenset(phases.parts_of(teachers)), {}
    for label, phase, turn in (*step, *step):
        for transition in phases.transitions(memory, there, phase, teachers, turn):
            there = transition.resident_after(there)
        found[label] = there
    return found


def working_bytes(setting: Setting, stages: Stages) -> dict[str, float]:
    """What each phase needs beside the resident parts, on a rank of these stages."""
    parallel, student = setting.config.parallel, setting.student_layout
    longest = setting.config.rollout.max_prompt_len + setting.config.horizon.max_len
    # A row is never cut, even where it is longer than the budget; the student's ranks may share its tokens.
    read = setting.config.teacher_prompt_limit + setting.config.horizon.max_len
    tokens = max(parallel.microbatch_tokens, longest / student.context)
    theirs = max(parallel.microbatch_tokens, read)
    forward = teacher_forward(setting, theirs, stages.teacher)
    trains = stages.student == student.pipeline - 1
    of_all = setting.responses * setting.lengths.mean(setting.config.horizon.max_len)
    _, trained_on = hidden_bytes(setting, of_all, longest)
    found = {
        "sync": max(_sync_bytes(setting), merging_bytes(setting)),
        "rollout": float(ENGINE_WORKSPACE),
        "teacher": teacher_bytes(setting, stages, forward, *hidden_bytes(setting, of_all, longest)),
        "train": tokens * _activation_bytes(setting, stages.student)
        + (loss_bytes(setting, tokens) + trained_on) * trains,
    }
    found[AVERAGE] = found["sync"]  # at most: where both lie alike, one weight in fp32
    found["train"] += _fp8_copy(setting, setting.student, student, setting.config.precision.student_fp8.on)
    if INFLIGHT in phases_of(setting):
        look = teacher_bytes(setting, stages, forward, *hidden_bytes(setting, _looked_at(setting), 0.0))
        found[INFLIGHT] = found.pop("rollout") + look
    return {phase: found[phase] for phase in phases_of(setting)}


def teacher_bytes(setting: Setting, stages: Stages, forward: float, held: float, trained_on: float) -> float:
    """Bytes at the fullest moment of a teacher pass: its last micro-batch beside the hidden states of the others, or
    the exchange of them. held: bytes of hidden states on the teacher's last stage; trained_on: on the student's."""
    student, teacher = setting.student_layout, setting.teacher_layout
    held *= stages.teacher == teacher.pipeline - 1
    trained_on *= stages.student == student.pipeline - 1
    if _alike(setting):
        return forward + held
    return max(forward + held, held + trained_on + min(held, phases.EXCHANGE_BYTES))


def _alike(setting: Setting) -> bool:
    """Whether the teacher lies like the student and reads the same, so that a rank trains on rows it has computed."""
    student, teacher, reads = setting.student_layout, setting.teacher_layout, setting.config.data.teacher_prompt
    sizes = (student.tensor, student.pipeline, student.context) == (teacher.tensor, teacher.pipeline, 1)
    return sizes and reads is None


def _sync_bytes(setting: Setting) -> float:
    """Bytes of two buckets; those of the vocabulary's matrices, which come last, may be larger than the others.

    A matrix that ranks share has room for their shards beside the whole (weights/buckets.py), and one bucket of the
    layers before is still there. A rank with the whole model copies q, k and v alone, which megatron-core has in one.
    """
    layout, spec = setting.student_layout, setting.student
    bucket = setting.config.rollout.bucket_mb * 2**20
    if layout.tensor * layout.pipeline * layout.expert == 1:
        qkv = (spec.heads + 2 * spec.kv_heads) * spec.head_dim * spec.hidden * setting.weight_bytes
        return float(min(2 * bucket, spec.layers * qkv))
    matrix = spec.vocab_size * spec.hidden * setting.weight_bytes * (2 if layout.tensor > 1 else 1)
    return 2 * bucket if matrix <= bucket else bucket + matrix * (1 if spec.tied else 2)


def teacher_forward(setting: Setting, tokens: float, stage: int) -> float:
    """Bytes of the teacher's forward pass beside its weights. With experts over TP ranks it has sequence parallelism.

    Nothing is kept for a backward pass: attention's part of a layer is gone when the feed-forward part is there, and
    experts, one after the other, leave their results alone. What a stage gets and sends on is
    there until the next micro-batch has gone through. The memory in which the student gathers its layers' input
    stays (megatron-core's buffer; frozen matrices do without).
    """
    spec, layout, config = setting.teacher, setting.teacher_layout, setting.config
    if not setting.teacher_layers:
        return 0.0
    shared = layout.tensor if spec.moe is not None else 1
    stream, attention, feed_forward = _layer_parts(spec, layout.tensor, spec.moe is not None and layout.tensor > 1)
    if spec.moe is not None:
        feed_forward = _dispatched_bytes(spec, shared) + 2 * spec.hidden * spec.moe.per_token / shared
    sequence = config.parallel.sequence_parallel and not config.lora.on
    gathered = _gathered_bytes(setting.student, setting.student_layout.tensor, sequence)
    messages = (stage > 0) + (stage < layout.pipeline - 1)
    sent = 2 * spec.hidden / shared * messages
    each = stream + max(attention, feed_forward) + gathered + sent
    return tokens * each + _fp8_copy(setting, spec, layout, config.precision.teacher_fp8.on)


def _fp8_copy(setting: Setting, spec: ModelSpec, layout: ParallelSizes, fp8: bool) -> float:
    """Bytes of one layer's weights in FP8, as they are and transposed: they are quantised anew for every pass."""
    return 2 * largest_rank(spec, layout, head=False).all / (spec.layers / layout.pipeline) if fp8 else 0.0


def hidden_bytes(setting: Setting, tokens: float, longest: float) -> tuple[float, float]:
    """Bytes of the teacher's hidden states on a rank: those that it has computed and holds, and those it trains on.

    tokens: of all responses together. longest: of one row, which no replica has less than. Where the teacher lies like
    the student, they are the same (redistribute.py).
    """
    each = setting.teacher_token_bytes
    teacher = setting.teacher_layout
    trained_on = max(tokens / setting.student_layout.replicas, longest) * each
    return trained_on if _alike(setting) else tokens * each / (teacher.replicas * teacher.tensor), trained_on


def _looked_at(setting: Setting) -> float:
    """Tokens of the responses that are looked at together: all that reach a look, as if they went side by side."""
    config, rows = setting.config, setting.responses
    lengths = setting.lengths.quantiles(min(rows, 512), config.horizon.max_len)
    looks = config.rollout.inflight.looks(config.horizon.max_len)
    reached = [look * (len(lengths) - bisect_left(lengths, look)) / len(lengths) for look in looks]  # they ascend
    return rows * max(reached, default=0.0)


def loss_bytes(setting: Setting, tokens: float) -> float:
    """Bytes of the loss on a rank's tokens of a micro-batch: those of a chunk, and the hidden states' gradient.

    A chunk has both heads' logits on this rank's part of the vocabulary, the maximum of each block of ids, and the ids
    and values of the best blocks. Where ranks share the vocabulary the gradient is added up in fp32, and rounded when
    the chunks are done.
    """
    layout, config, objective = setting.student_layout, setting.config, setting.config.objective
    width = max(setting.student.vocab_size, setting.teacher.vocab_size) / layout.tensor
    chunk, gradient = min(config.parallel.loss_chunk_tokens, tokens), 2 * setting.student.hidden * tokens
    logits = LOSS_MATRICES[objective.kernels] * 4 * width * chunk
    best = 2 * (4 * width / TOPK_BLOCK + 20 * objective.k * TOPK_BLOCK) * chunk
    return logits + (gradient + best if layout.tensor == 1 else 2 * gradient + max(best, gradient))


def _gathered_bytes(spec: ModelSpec, tensor: int, sequence_parallel: bool) -> float:
    """Bytes of a token's hidden state on a rank that has a part of the tokens and needs all."""
    return 2 * spec.hidden if sequence_parallel and tensor > 1 else 0


def _at_start(setting: Setting, parts: dict[str, float]) -> float:
    """Either what is built before the engine, or the engine beside what cannot move away: vLLM wants its share free.

    Adam's moments come with the first step.
    """
    models = {part: size for part, size in parts.items() if part not in phases.ENGINE}
    models[phases.OPTIMIZER] *= 1 / 3 if setting.config.precision.params == "bf16" else 0
    may_move = phases.movable(setting.config.memory, setting.teachers)
    staying = sum(size for part, size in models.items() if part not in may_move)
    engine = sum(parts[part] for part in phases.ENGINE) + ENGINE_WORKSPACE
    in_turn = [models.pop(part) for part in map(phases.part_of, setting.teachers) if part in may_move]
    return max(sum(models.values()) + max(in_turn, default=0.0), staying + engine)


def _teacher_head(setting: Setting, student: ParallelSizes) -> float:
    """Parameters of the teacher's output matrix, cut as the student's; 0 where it is the teacher's embedding."""
    teacher = setting.teacher_layout
    if setting.config.teacher_server.on:
        return 0
    alike = teacher.tensor == student.tensor and teacher.pipeline == student.pipeline == 1
    if setting.teacher.tied and alike and setting.teacher_layers:
        return 0
    return setting.teacher.padded_vocab(student.tensor) / student.tensor * setting.teacher.hidden


def _activation_bytes(setting: Setting, stage: int) -> float:
    """Bytes of one token over the layers of a stage of the student, times the micro-batches under way there.

    A stage also keeps what it has sent on: megatron-core holds it until its gradient comes.
    """
    parallel, layout, spec = setting.config.parallel, setting.student_layout, setting.student
    tensor, sequence = layout.tensor, parallel.sequence_parallel
    chunks = chunks_under_way(stage, layout.pipeline, parallel.virtual_pipeline)
    # Transformer Engine keeps the keys and values that came last from another rank, in a piece of their own.
    ring = 4 * spec.kv_heads * spec.head_dim / tensor if layout.context > 1 else 0.0
    full = parallel.recompute == "full"
    kept = spec.layers / layout.pipeline / parallel.virtual_pipeline
    own = ring + kept_change(spec, setting.config.lora, tensor, sequence)
    kept *= kept_bytes(spec, tensor, sequence, parallel.recompute) + (0 if full else own)
    sent = 2 * spec.hidden / (tensor if sequence else 1)
    ends_here = stage == layout.pipeline - 1 and parallel.virtual_pipeline == 1
    beside = sent if stage else 0  # the last gradient that went back, until the next one is there
    beside += 2 * sent if parallel.virtual_pipeline > 1 else 0  # what has come for the next chunk, either way
    again = layer_bytes(spec, tensor, sequence) + own if full else 0.0
    backward = _backward_bytes(spec, tensor, sequence, setting.config.lora.on)
    return chunks * (kept + (0 if ends_here else sent)) + beside + again + backward


def chunks_under_way(stage: int, stages: int, virtual: int) -> int:
    """Chunks of layers whose micro-batch has gone forward through a stage and not yet back, at most.

    As in megatron-core's schedules: a micro-batch for each stage from here on, or with `virtual` chunks on a stage two,
    and one for each stage and earlier chunk ("Efficient Large-Scale Language Model Training", arXiv 2104.04473, 2.2).
    """
    after = stages - 1 - stage
    return after + 1 if virtual == 1 else 2 * after + (virtual - 1) * stages + 1


def _backward_bytes(spec: ModelSpec, tensor: int, sequence_parallel: bool, frozen: bool) -> float:
    """Bytes of a token at the fullest moment of a layer's backward pass, beside what the layer has kept of it.

    The gradient of SwiGLU's product and of both its factors, less the product, which is gone by then, or what the
    experts' tokens need on their way; the gradient of the layer's output; gathered from the ranks the layer's input,
    which frozen matrices do not need, and of a dense layer the gradient of its output.
    """
    shared = tensor if sequence_parallel else 1
    feed_forward = 4 * spec.ffn / tensor if spec.moe is None else _dispatched_bytes(spec, shared)
    gathered = _gathered_bytes(spec, tensor, sequence_parallel) * ((spec.moe is None) + (not frozen))
    return feed_forward + 2 * spec.hidden / shared + gathered


def _dispatched_bytes(spec: ModelSpec, shared: int) -> float:
    """Bytes of a token on the way to its experts and back: in their order here, as it arrived, in the order of the
    experts there, and their results."""
    assert spec.moe is not None
    return 4 * 2 * spec.hidden * spec.moe.per_token / shared


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
    outputs of both norms; q, k and v in one piece, q before its norm, rotated q and k, attention's output, cos and sin
    for q and for k; gate and up in one piece, SiLU of gate, a copy of up (megatron-core adds its offset, 0), their
    product. An expert also keeps the product before it is weighted, and its copy of the token.
    """
    return sum(_layer_parts(spec, tensor, sequence_parallel))


def _layer_parts(spec: ModelSpec, tensor: int, sequence_parallel: bool) -> tuple[float, float, float]:
    """`layer_bytes` of the stream between the parts and its norms, of attention, of the feed-forward part."""
    shared = tensor if sequence_parallel else 1
    width = spec.heads * spec.head_dim
    groups = spec.kv_heads * spec.head_dim
    before_norm = 2 * width * spec.qk_norm  # q, apart from k and v
    attention = (2 * (width + 2 * groups) + 2 * (width + groups) + 2 * width + before_norm) / tensor + 8 * spec.head_dim
    if spec.moe is not None:
        feed_forward = spec.moe.per_token * (12 * spec.moe.ffn + 2 * spec.hidden) / shared
    else:
        feed_forward = 10 * spec.ffn / tensor
    return 8 * spec.hidden / shared, attention, feed_forward
