"""Settings of what is generated, and of the in-flight gate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from annotated_types import Interval

from prune_opd.config.checks import Checked, Count, CountOrZero, Positive, PositiveOrZero, ShareAboveZero

# vLLM's names. Quantised weights: they are quantised when they are loaded, and again at every reload.
Quantization = Literal["fp8", "fp8_per_tensor", "fp8_per_channel", "fp8_per_block"]
KvCacheDtype = Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2"]
HeadDtype = Literal["auto", "fp32"]
QUANTIZATIONS, KV_CACHE_DTYPES = get_args(Quantization), get_args(KvCacheDtype)
# Two tokens whose scores are closer than this [nats] may be ordered differently by the engine and by the trainer. In
# fp32 it is twice what the check after the first weight sync allows any token. Coarser formats have no such bound:
# single tokens of a sharp model are half a nat off, most of them far less.
MARGIN = {"fp32": 2e-3, "bf16": 0.25, "fp8": 0.5}
# Nats by which engine and trainer may differ in a sampled token's log-probability, on average over many tokens. In bf16
# rounding alone puts single tokens of a sharp model off by half a nat, and wrong weights give several nats on average.
# FP8 rollouts of the tiny pair are 0.16 off on average.
MISMATCH_LIMIT = {"fp32": 1e-3, "bf16": 0.1, "fp8": 0.5}


@dataclass(frozen=True)
class InflightConfig(Checked, name="rollout.inflight"):
    """Stopping drifting responses while they are generated: this project's extension of Prune-OPD. Lengths in tokens.

    At certain lengths of a response, the looks, the teacher scores what is there. A response whose reliability R has
    reached 0 is cut off at that length.
    """

    mode: Literal["off", "gate"] = "off"  # gate: responses are stopped
    # geometric: looks at first_check · 1, 2, 4, 8 … | fixed: at first_check, then every `chunk`
    schedule: Literal["geometric", "fixed"] = "geometric"
    first_check: Count = 256  # response length at which the teacher looks for the first time
    chunk: Count = 256  # fixed: tokens between two looks
    stop_events: Count | None = (
        None  # None: R has reached 0; else this many events, which may cut tokens that R > 0 has
    )
    min_keep: Count = 1  # a response that is stopped keeps at least so many tokens: there is no look before
    # Cost of a token that the teacher reads, as a share of what generating and training a response token costs. Above
    # 0 only the looks that paid in the last batches take place (inflight/look_schedule.py); 0: all do.
    price: PositiveOrZero = 0.0
    margin: PositiveOrZero | None = (
        None  # nats; None: by the format of the rollouts (MARGIN). 0: exact ties alone are undecided
    )

    @property
    def on(self) -> bool:
        return self.mode == "gate"

    def looks(self, max_tokens: int) -> tuple[int, ...]:
        """Lengths [tokens], ascending, at which a response of at most `max_tokens` is looked at.

        There is no look at `max_tokens` itself: nothing is left to stop there.
        """
        lengths, at = [], self.first_check
        while at < max_tokens:
            if at >= self.min_keep:
                lengths.append(at)
            at = 2 * at if self.schedule == "geometric" else at + self.chunk
        return tuple(lengths)


@dataclass(frozen=True)
class RolloutConfig(Checked, name="rollout"):
    """What is generated each step, and the vLLM engine that does it."""

    prompts: Count = 64  # per step
    responses: Count = 4  # per prompt
    temperature: Positive = 1.0  # of the sampling; the objective has its own
    top_p: ShareAboveZero = 1.0  # the sampling's nucleus; 1: the whole vocabulary
    max_prompt_len: Count = 1024  # tokens; a longer prompt is a bad row
    tensor_parallel: Count = 1  # ranks per engine; world / tensor_parallel engines share the prompts
    # CPU only, the most: max_num_seqs sequences of the longest length need no more. A GPU takes gpu_memory_utilization
    kv_cache_gb: Positive = 1.0
    gpu_memory_utilization: ShareAboveZero = 0.5  # share of a GPU's memory that vLLM takes, weights included
    max_num_seqs: Count = 256  # responses that an engine works on at a time
    # vLLM without compiled graphs; null: compiled on a GPU, and on a CPU where a run is long enough to pay for tracing
    enforce_eager: bool | None = None
    bucket_mb: Positive = 512  # of weights on their way from the trainer; two buckets exist at a time
    # to FP8 at every load; dense models lose least with fp8_per_block. fp8 is vLLM's older name of fp8_per_tensor
    quantization: Quantization | None = None
    kv_cache_dtype: KvCacheDtype = "auto"  # auto: as the parameters; fp8 is e4m3
    # logits are computed in it. auto: as the parameters, so a bf16 engine rounds its logits to 8 bits; fp32: as the
    # trainer's, at no memory on a GPU, and on a CPU with a copy of the whole head in fp32 for every token
    head_dtype: HeadDtype = "auto"
    inflight: InflightConfig = field(default_factory=InflightConfig)
    # ask the engine for the log-probabilities of the sampled tokens: how far it is from the trainer, every step
    logprobs: bool = True
    parity_every: CountOrZero = (
        0  # steps between two checks of the engine's log-probabilities; the first two syncs always are
    )
    oversample: Annotated[float, Interval(ge=1, le=16)] = (
        1.0  # a step starts this times `prompts` and keeps the first complete ones
    )
    partial: bool = False  # oversample > 1: the other prompts go on in the next step, with the tokens that they have
    # steps for which the student generates at once, before it moves: 1: on-policy | more: these are reused until then |
    # 0: once, by the initial student for the whole run (Semi-OPD)
    refresh_every: CountOrZero = 1
    correct_stale: bool = True  # weigh a token that an older student has sampled by the ratio of both probabilities

    @property
    def reuses(self) -> bool:
        """Whether steps train on rollouts that an earlier one has generated."""
        return self.refresh_every != 1

    def coarsest_format(self, params: str) -> str:
        """fp32, bf16 or fp8: the coarsest format that the rollouts are computed in. params: of the parameters."""
        return params if self.quantization is None and self.kv_cache_dtype == "auto" else "fp8"
