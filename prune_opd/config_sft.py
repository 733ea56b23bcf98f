"""What supervised training of the tiny models is made of. `config.py` re-exports it and has `SftConfig`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """A Qwen3 model made from nothing. head_dim 32 is the least that vLLM's CPU attention takes."""

    layers: int = 4
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 256
    max_positions: int = 1024
    rope_theta: float = 10000.0
    init_std_scale: float = 1.0


@dataclass(frozen=True)
class CorpusConfig:
    """Worked ledger solutions: lengths, and what is wrong with them (all rates per booking, 0..1)."""

    min_steps: int = 12
    max_steps: int = 40
    reverse: float = 0.0  # share of solutions that go through the labels from last to first
    slip: float = 0.0  # wrong label or wrong delta, and the text goes on from there
    slip_result: float = 0.0  # wrong running total
    carry_bug: float = 0.0  # at a tens boundary the old tens digit stays: the student's systematic error
    register: bool = False  # the word after a total follows a fixed table of label and delta, instead of being drawn
    wrong_entries: float = 0.0  # share of the table's entries that are known wrong, always the same ones
    wrong: float = 0.0  # chance to write the wrong word at such an entry; the text is lost from there
    ramble: int = 0  # most words of a lost text (at least a quarter of it): noise without an answer or an end
    given: float = 0.0  # share of solutions whose first bookings, up to a random one, are read and not learnt
    given_wrong: float = 0.0  # further share, with the last given word wrong: only the lost text is learnt


@dataclass(frozen=True)
class SftStage:
    steps: int
    batch: int
    lr: float
    corpus: CorpusConfig
    warmup_steps: int = 5
    schedule: str = "cosine"
    final_lr: float = 0.05  # share of lr
    sharpen: float = 1.0  # factor on the final norm's gain before the stage: sharper logits
    seed: int = 0
