"""Settings of what is generated, and of the in-flight gate."""

from __future__ import annotations

from dataclasses import dataclass, field

from prune_opd.config.checks import between, one_of

# vLLM's names. Quantised weights: they are quantised when they are loaded, and again at every reload.
QUANTIZATIONS = ("fp8", "fp8_per_tensor", "fp8_per_channel", "fp8_per_block")
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2")
# Two tokens whose scores are closer than this [nats] may be ordered differently by the engine and by the trainer. In
# fp32 it is twice what the check after the first weight sync allows any token. Coarser formats have no such bound:
# single tokens of a sharp model are half a nat off, most of them far less.
MARGIN = {"fp32": 2e-3, "bf16": 0.25, "fp8": 0.5}


@dataclass(frozen=True)
class InflightConfig:
    """Stopping drifting responses while they are generated: this project's extension of Prune-OPD. Lengths in tokens.

    At certain lengths of a response, the looks, the teacher scores what is there. A response whose reliability R has
    reached 0 is cut off at that length.
    """

    mode: str = "off"  # off | gate
    schedule: str = "geometric"  # looks at first_check · 1, 2, 4, 8 … | fixed: at first_check, then every `chunk`
    first_check: int = 256  # response length at which the teacher looks for the first time
    chunk: int = 256  # fixed: tokens between two looks
    stop_events: int | None = None  # None: R has reached 0; else this many events, which may cut tokens that R > 0 has
    min_keep: int = 1  # a response that is stopped keeps at least so many tokens: there is no look before
    # Cost of a token that the teacher reads, as a share of what generating and training a response token costs. Above
    # 0 only the looks that paid in the last batches take place (inflight/look_schedule.py); 0: all do.
    price: float = 0.0
    margin: float | None = None  # nats; None: by the format of the rollouts (MARGIN). 0: exact ties alone are undecided

    def __post_init__(self) -> None:
        one_of("rollout.inflight.mode", self.mode, ("off", "gate"))
        one_of("rollout.inflight.schedule", self.schedule, ("geometric", "fixed"))
        for name in ("first_check", "chunk", "min_keep"):
            between(f"rollout.inflight.{name}", getattr(self, name), 1)
        if self.stop_events is not None:
            between("rollout.inflight.stop_events", self.stop_events, 1)
        between("rollout.inflight.price", self.price, 0)
        if self.margin is not None:
            between("rollout.inflight.margin", self.margin, 0)

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
class RolloutConfig:
    """What is generated each step, and the vLLM engine that does it."""

    prompts: int = 64  # per step
    responses: int = 4  # per prompt
    temperature: float = 1.0  # of the sampling; the objective has its own
    top_p: float = 1.0  # the sampling's nucleus; 1: the whole vocabulary
    max_prompt_len: int = 1024  # tokens; a longer prompt is a bad row
    tensor_parallel: int = 1  # ranks per engine; world / tensor_parallel engines share the prompts
    kv_cache_gb: float = 1.0  # CPU only: a GPU takes gpu_memory_utilization
    gpu_memory_utilization: float = 0.5  # share of a GPU's memory that vLLM takes, weights included
    max_num_seqs: int = 256  # responses that an engine works on at a time
    enforce_eager: bool | None = None  # vLLM without compiled graphs; null: so on the CPU, compiled on a GPU
    bucket_mb: float = 512  # of weights on their way from the trainer; two buckets exist at a time
    quantization: str | None = None  # to FP8 at every load: fp8 | fp8_per_tensor | fp8_per_channel | fp8_per_block
    kv_cache_dtype: str = "auto"  # auto: as the parameters | fp8 (e4m3) | fp8_e4m3 | fp8_e5m2
    inflight: InflightConfig = field(default_factory=InflightConfig)
    oversample: float = 1.0  # a step starts this times `prompts` and keeps the first complete ones
    partial: bool = False  # oversample > 1: the other prompts go on in the next step, with the tokens that they have

    def __post_init__(self) -> None:
        between("rollout.oversample", self.oversample, 1, 16)
        for name in ("prompts", "responses", "max_prompt_len", "tensor_parallel", "max_num_seqs"):
            between(f"rollout.{name}", getattr(self, name), 1)
        between("rollout.bucket_mb", self.bucket_mb, 0, open_low=True)
        between("rollout.temperature", self.temperature, 0, open_low=True)
        between("rollout.top_p", self.top_p, 0, 1, open_low=True)
        between("rollout.kv_cache_gb", self.kv_cache_gb, 0, open_low=True)
        between("rollout.gpu_memory_utilization", self.gpu_memory_utilization, 0, 1, open_low=True)
        if self.quantization is not None:
            one_of("rollout.quantization", self.quantization, QUANTIZATIONS)
        one_of("rollout.kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
