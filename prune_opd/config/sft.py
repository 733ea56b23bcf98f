"""Settings of the supervised training that makes the tiny models."""

from __future__ import annotations

from dataclasses import dataclass, field

from prune_opd.config.checks import Checked, CountOrZero, Share
from prune_opd.config.training import ParallelConfig, Schedule
from prune_opd.errors import ConfigError


@dataclass(frozen=True)
class ModelShape:
    """A new Qwen3 model. head_dim 32 is the smallest that vLLM's CPU attention takes."""

    layers: int = 4  # decoder layers
    hidden: int = 128  # width of the residual stream
    heads: int = 4  # query heads
    kv_heads: int = 2  # key-value heads
    head_dim: int = 32  # width of a head
    ffn: int = 256  # width of the feed-forward layers
    max_positions: int = 1024  # longest sequence
    rope_theta: float = 10000.0  # base of the rotary frequencies
    init_std_scale: float = 1.0  # factor on the initial weights' standard deviation


@dataclass(frozen=True)
class CorpusConfig(Checked, name="corpus"):
    """Worked ledger solutions: their lengths and their errors (all rates per booking, 0..1)."""

    min_steps: int = 12  # fewest bookings of a problem
    max_steps: int = 40  # most bookings of a problem
    reverse: Share = 0.0  # share of solutions that go through the labels from last to first
    slip: Share = 0.0  # wrong label or wrong delta, and the text goes on from there
    slip_result: Share = 0.0  # wrong running total
    carry_bug: Share = 0.0  # at a tens boundary the old tens digit stays: the student's systematic error
    register: bool = False  # the word after a total follows a fixed table of label and delta, instead of being drawn
    wrong_entries: Share = 0.0  # share of the table's entries that are known wrongly, always the same ones
    wrong: Share = 0.0  # chance to write the wrong word at such an entry; the text is lost from there
    ramble: CountOrZero = 0  # most words of a lost text (at least a quarter of it): noise without an answer or an end
    chant: bool = False  # a lost text repeats its wrong word instead: anyone can go on with it
    given: Share = 0.0  # share of solutions whose first bookings, up to a random one, are read and not learnt
    sorting: Share = 0.0  # share of the examples that are reasoning-gym's number_sorting instead (data/gym_words.py)
    given_wrong: Share = 0.0  # a further share: as `given`, with the last word wrong; only the lost text is learnt
    # share of solutions that stand in the prompt too, errors and all: the text to learn says the same in other words
    hinted: Share = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("wrong_entries", "wrong", "ramble", "chant", "given", "given_wrong"):
            if getattr(self, name) and not self.register:
                raise ConfigError(
                    f"corpus.{name} = {getattr(self, name)} has no effect without the register: leave it out"
                )
        if self.given + self.given_wrong > 1:
            raise ConfigError(
                f"corpus.given + corpus.given_wrong = {self.given + self.given_wrong} is more than all solutions: "
                "lower one of them"
            )
        if self.hinted and self.register:
            raise ConfigError(
                f"corpus.hinted = {self.hinted} with corpus.register = true: a word of the register has no other words "
                "for it; leave one of them out"
            )


@dataclass(frozen=True)
class SftStage:
    """One stage of supervised training, with its own corpus and schedule."""

    steps: int  # of the optimizer
    batch: int  # solutions a step
    lr: float  # the highest learning rate
    corpus: CorpusConfig
    warmup_steps: int = 5  # steps in which the rate rises from 0 to lr
    schedule: Schedule = "cosine"  # of the learning rate
    final_lr: float = 0.05  # share of lr
    sharpen: float = 1.0  # factor on the final norm's gain before the stage: sharper logits
    seed: int = 0  # of the solutions


@dataclass(frozen=True)
class SftConfig:
    """Supervised training of a tiny model on worked solutions, through the same Megatron path as the distillation."""

    name: str  # of the model
    output: str  # the Hugging Face directory that is written
    stages: tuple[SftStage, ...]
    init: str | None = None  # the Hugging Face directory to start from; None: a new model of `shape`
    shape: ModelShape = field(default_factory=ModelShape)
    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig(tensor=1))
    beta2: float = 0.98  # of AdamW
    weight_decay: float = 0.01  # of AdamW
    seed: int = 0  # of the weights of a new model
