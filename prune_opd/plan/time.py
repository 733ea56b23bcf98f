"""Seconds of each phase of a step on the slowest GPU, from operations, bytes and the constants of hardware.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from prune_opd.model_spec import ModelSpec
from prune_opd.plan.adapters import WHOLE, adapter_flops, backward_products, trained_on_fullest
from prune_opd.plan.counts import (
    ParallelSizes,
    active_parameters,
    cache_bytes,
    flops_by_length,
    parameters,
    touched_parameters,
)
from prune_opd.plan.hardware import (
    COLLECTIVE_EFFICIENCY,
    COMPUTE_EFFICIENCY,
    DECODE_EFFICIENCY,
    DECODE_OVERHEAD,
    FITTED_PARAMETERS,
    FITTED_TOKENS,
    FP8_EFFICIENCY,
    HOP_LATENCY,
    STEP_OVERHEAD,
)
from prune_opd.plan.setting import Setting

PHASES = ("sync", "rollout", "teacher", "train", "all-reduce", "overhead")
PROMPT_SHARE = 0.25  # mean prompt length as a share of rollout.max_prompt_len; assumed


@dataclass(frozen=True)
class StepTime:
    """One step at one horizon. seconds: by phase. tokens: of responses, over all ranks."""

    horizon: float
    seconds: dict[str, float]
    tokens: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def longest(self) -> str:
        """The phase that takes most of it."""
        return max(self.seconds, key=lambda phase: self.seconds[phase])


def step_time(setting: Setting, horizon: float, cache_tokens: float, phases: Sequence[str] = PHASES) -> StepTime:
    """A step at one horizon. cache_tokens: capacity of an engine's KV cache. phases: the ones to work out."""
    prompt = PROMPT_SHARE * setting.config.rollout.max_prompt_len
    lengths = setting.lengths.quantiles(min(setting.responses, 512), horizon)
    tokens = sum(lengths) / len(lengths) * setting.responses
    rows = [prompt + length for length in lengths]
    read = [PROMPT_SHARE * setting.config.teacher_prompt_limit + length for length in lengths]
    of_phase: dict[str, Callable[[], float]] = {
        "sync": lambda: sync_seconds(setting),
        "rollout": lambda: rollout_seconds(setting, horizon, prompt, cache_tokens),
        "teacher": lambda: sum(teacher_seconds(one, read) for one in setting.of.values() or (setting,)),
        "train": lambda: train_seconds(setting, rows),
        "all-reduce": lambda: all_reduce_seconds(setting),
        "overhead": lambda: overhead_seconds(setting, horizon),
    }
    return StepTime(horizon, {phase: of_phase[phase]() for phase in phases}, tokens)


def mean_step(setting: Setting, steps_by_horizon: Mapping[float, int], cache_tokens: float) -> StepTime:
    """The mean of a run's steps. steps_by_horizon: how many steps have each horizon.

    The last response to end sets a step's time, so a step at the mean horizon takes another time than the mean step.
    """
    total, steps = sum(steps_by_horizon.values()), {}
    for horizon, count in steps_by_horizon.items():
        steps[horizon] = step_time(setting, horizon, cache_tokens), count / total
    return StepTime(
        horizon=sum(share * horizon for horizon, (_, share) in steps.items()),
        seconds={phase: sum(share * step.seconds[phase] for step, share in steps.values()) for phase in PHASES},
        tokens=sum(share * step.tokens for step, share in steps.values()),
    )


def sync_seconds(setting: Setting) -> float:
    """Every rank receives all of the student's tensors whole (weights/stream.py) and writes them to memory twice."""
    size = parameters(setting.student) * setting.weight_bytes
    sent = size / (setting.link * COLLECTIVE_EFFICIENCY) if setting.world > 1 else 0.0
    buckets = size / (setting.config.rollout.bucket_mb * 2**20)
    return sent + 2 * size / setting.gpu.bandwidth + buckets * setting.world * HOP_LATENCY


def rollout_seconds(setting: Setting, horizon: float, prompt: float, cache_tokens: float) -> float:
    """Seconds of an engine with an even share of the responses: prefill, then a decoding step for each token of the
    longest one.

    A step takes as long as reading the weights and the cache of the running responses, or as computing, whichever is
    longer. Where not all responses of an engine fit at once, one that ends makes room for the next.
    """
    rollout, spec = setting.config.rollout, setting.student
    waiting = -(-setting.responses // setting.engines)
    lengths = setting.lengths.quantiles(waiting, horizon)
    mean = sum(lengths) / waiting
    at_once = int(max(min(waiting, rollout.max_num_seqs, cache_tokens // (prompt + mean / 2)), 1))
    prefill = (
        waiting / rollout.responses * flops_by_length(spec)(prompt) / _flops(setting, rollout.quantization is not None)
    )
    prefill /= rollout.tensor_parallel
    queued = (waiting - at_once) / at_once * mean * _decode_step(setting, at_once, prompt + mean / 2)
    tail, done = 0.0, 0.0
    last = setting.lengths.quantiles(at_once, horizon)  # what runs when nothing waits any more
    for i, length in enumerate(last):
        if length > done:
            tail += (length - done) * _decode_step(setting, at_once - i, prompt + (done + length) / 2)
            done = length
    return prefill + queued + tail


def teacher_seconds(setting: Setting, rows: list[float]) -> float:
    """One forward pass without the head, and sending the hidden states to the student's last stage.

    Where a teacher's rows come from elsewhere they are only sent: a disk or a server is not planned.
    """
    spec, layout = setting.teacher, setting.teacher_layout
    work = _share(setting, rows, layout.replicas, flops_by_length(spec, head=False))
    ranks = layout.tensor * layout.pipeline
    compute = work / ranks / _flops(setting, setting.config.precision.teacher_fp8.on)
    tokens = _share(setting, rows, layout.replicas, float)
    moved = tokens * setting.teacher_token_bytes / (setting.link * COLLECTIVE_EFFICIENCY)
    if not setting.teacher_layers:
        return moved
    traffic = _layer_traffic(setting, spec, layout, tokens, 1) + _stage_traffic(setting, spec, layout, tokens, 1)
    return compute * _bubble(setting, layout, tokens, 1) + traffic + moved


def train_seconds(setting: Setting, rows: list[float]) -> float:
    """The student's forward and backward pass (forward twice with recompute), the loss's two heads, the optimizer."""
    spec, layout, parallel = setting.student, setting.student_layout, setting.config.parallel
    backward = backward_products(setting.config.lora)
    passes = 1 + backward + (parallel.recompute == "full")
    ranks = layout.tensor * layout.pipeline * layout.context
    body = _share(setting, rows, layout.replicas, flops_by_length(spec, head=False)) / ranks
    compute = passes * body / _flops(setting, setting.config.precision.student_fp8.on)
    tokens = _share(setting, rows, layout.replicas, float)
    compute += adapter_flops(spec, setting.config.lora, tokens) / ranks / _flops(setting, False)
    heads = (1 + backward) * spec.vocab_size * spec.hidden
    if not setting.config.teacher_server.on:
        heads += max(one.teacher.vocab_size * one.teacher.hidden for one in setting.of.values() or (setting,))
    loss = 2 * heads * tokens / (layout.tensor * layout.context) / _flops(setting, False)
    share = layout.replicas if parallel.distributed_optimizer else 1
    state = trained_on_fullest(setting).all * (4 + 2 * 12 / share)
    traffic = _layer_traffic(setting, spec, layout, tokens, 1 + WHOLE + (parallel.recompute == "full"))
    traffic += _stage_traffic(setting, spec, layout, tokens, 2 * parallel.virtual_pipeline)
    bubble = _bubble(setting, layout, tokens, parallel.virtual_pipeline)
    return compute * bubble + loss + traffic + state / (setting.gpu.bandwidth * DECODE_EFFICIENCY)


def all_reduce_seconds(setting: Setting) -> float:
    """Gradients in fp32 over the replicas in a ring, not overlapped; the distributed optimizer gathers bf16 instead."""
    layout = setting.student_layout
    count = trained_on_fullest(setting)
    bytes_each = 4 + (setting.weight_bytes if setting.config.parallel.distributed_optimizer else 4)
    total = 0.0
    for size, ranks in ((count.dense, layout.replicas * layout.context), (count.experts, layout.expert_replicas)):
        if size and ranks > 1:
            neighbours = ranks * layout.tensor
            share = (ranks - 1) / ranks * size * bytes_each / (setting.group_link(neighbours) * COLLECTIVE_EFFICIENCY)
            total += share + 2 * ranks * HOP_LATENCY
    return total


def overhead_seconds(setting: Setting, horizon: float) -> float:
    """What no other phase has: waking, offloading and checkpoints, and tokenising, gathering and logging responses.

    STEP_OVERHEAD is a fit to published hours of pairs from 3.5 to 15 B parameters, whose steps have 256 responses or
    more of up to 1024 to 12288 tokens. Within those it shows no trend, neither with the parameters nor with the tokens.
    For smaller runs there is nothing to fit. What moves models goes with their parameters there, what handles responses
    with their tokens, both from nothing up to the smallest fitted run; that each is half of it is assumed.
    """
    teachers = sum(parameters(one.teacher) for one in setting.of.values() or (setting,))
    parameters_share = (parameters(setting.student) + teachers) / FITTED_PARAMETERS
    tokens_share = setting.responses * horizon / FITTED_TOKENS
    return STEP_OVERHEAD * (min(parameters_share, 1) + min(tokens_share, 1)) / 2


def evaluation_seconds(setting: Setting, cache_tokens: float) -> float:
    """One evaluation: problems × samples on the rollout engines."""
    evaluation, config = setting.config.evaluation, setting.config
    if not evaluation.problems:
        return 0.0
    rollout = replace(config.rollout, prompts=evaluation.problems, responses=evaluation.samples)
    longest = evaluation.max_len or config.horizon.max_len
    prompt = PROMPT_SHARE * config.rollout.max_prompt_len
    return rollout_seconds(replace(setting, config=replace(config, rollout=rollout)), longest, prompt, cache_tokens)


def _decode_step(setting: Setting, running: float, context: float) -> float:
    """Seconds of one token for each of `running` responses whose contexts have this many tokens on average."""
    rollout, spec = setting.config.rollout, setting.student
    quantised = rollout.quantization is not None
    weights = touched_parameters(spec, running) * (1 if quantised else setting.weight_bytes) / rollout.tensor_parallel
    each = 1 if rollout.kv_cache_dtype != "auto" else setting.weight_bytes
    cache = running * context * cache_bytes(spec, each, rollout.tensor_parallel)
    read = (weights + cache) / (setting.gpu.bandwidth * DECODE_EFFICIENCY)
    computed = 2 * running * active_parameters(spec) / rollout.tensor_parallel / _flops(setting, quantised)
    shared = 0.0
    if rollout.tensor_parallel > 1:  # two all-reduces a layer, small ones: latency is all there is
        shared = 2 * spec.layers * HOP_LATENCY
    return max(read, computed) + shared + DECODE_OVERHEAD


def _flops(setting: Setting, fp8: bool) -> float:
    """FLOP/s of one GPU, as a run gets them. An A100 gains nothing from FP8."""
    bf16 = setting.gpu.bf16 * COMPUTE_EFFICIENCY
    return max(bf16, setting.gpu.fp8 * FP8_EFFICIENCY) if fp8 else bf16


def _share(setting: Setting, rows: list[float], replicas: int, cost: Callable[[float], float]) -> float:
    """Cost on the busiest replica: an even share, since rows are dealt by length, but at least the longest row's."""
    costs = [cost(row) for row in rows]
    return max(sum(costs) / len(costs) * setting.responses / replicas, max(costs))


def _bubble(setting: Setting, layout: ParallelSizes, tokens: float, virtual: int) -> float:
    """Factor by which idle stages at both ends prolong a pipeline's work (arXiv 2104.04473, section 2.2)."""
    batches = max(tokens / setting.config.parallel.microbatch_tokens, 1)
    return 1 + (layout.pipeline - 1) / (virtual * batches)


def _layer_traffic(setting: Setting, spec: ModelSpec, layout: ParallelSizes, tokens: float, passes: int) -> float:
    """Seconds of the tensor, expert and context parallel collectives, none of them overlapped.

    Tensor: two all-reduces (or their halves) of the residual in each layer and pass. Expert: an all-to-all there and
    back for each expert of a token. Context: keys and values of all other ranks, in the backward pass also gradients.
    """
    layers, each = spec.layers / layout.pipeline, tokens / layout.context * spec.hidden * setting.weight_bytes
    total = 0.0
    if layout.tensor > 1:
        bytes_sent = 2 * layers * 2 * (layout.tensor - 1) / layout.tensor * each
        total += passes * bytes_sent / (setting.group_link(layout.tensor) * COLLECTIVE_EFFICIENCY)
    if spec.moe is not None and layout.expert > 1:
        bytes_sent = 2 * layers * spec.moe.per_token * (layout.expert - 1) / layout.expert * each / layout.tensor
        total += passes * bytes_sent / (setting.group_link(layout.expert) * COLLECTIVE_EFFICIENCY)
    if layout.context > 1:
        cache = cache_bytes(spec, setting.weight_bytes, layout.tensor) / layout.pipeline
        bytes_sent = (layout.context - 1) * tokens / layout.context * cache
        total += passes * bytes_sent / (setting.group_link(layout.tensor * layout.context) * COLLECTIVE_EFFICIENCY)
    return total


def _stage_traffic(setting: Setting, spec: ModelSpec, layout: ParallelSizes, tokens: float, crossings: int) -> float:
    """Seconds to send hidden states and gradients between stages, over the slowest link: stages lie farthest apart."""
    if layout.pipeline == 1:
        return 0.0
    bytes_sent = crossings * tokens / layout.context * spec.hidden * setting.weight_bytes
    return bytes_sent / (setting.link * COLLECTIVE_EFFICIENCY)
