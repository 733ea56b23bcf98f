"""Rotary frequencies as transformers computes them, put into megatron-core's rotary module.

megatron-core has its own for some kinds, with constants where a config.json has settings (llama3's band, yarn's
attention factor outside the exponent of two), and takes the base as an integer. So all kinds are computed here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prune_opd.model_spec import RopeSpec

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from prune_opd.model_spec import ModelSpec


def set_frequencies(model: GPTModel, spec: ModelSpec) -> None:
    """The one place where a model gets its rotary frequencies; before its first forward pass, which caches angles."""
    rotary = model.rotary_pos_emb
    rotary.inv_freq = inverse_frequencies(spec.rope, spec.head_dim).to(rotary.inv_freq.device)


def attention_scale(spec: ModelSpec) -> float | None:
    """What query · key is multiplied by; None for the usual 1/√D.

    Yarn multiplies rotated queries and keys by its attention factor. The whole head is rotated, so their products grow
    by its square: one number, which every attention kernel takes, and nothing that a fused rotation could forget.
    """
    factor = spec.rope.attention_factor
    return None if factor == 1.0 else factor**2 / math.sqrt(spec.head_dim)


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Radians per position of each pair of dimensions [D/2], fp32, in the order of operations of transformers."""
    plain = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, head_dim)
    return plain


def _llama3(rope: RopeSpec, plain: Tensor) -> Tensor:
    """Long wavelengths are stretched, short ones kept, and those between go over smoothly."""
    longest = rope.original_positions / rope.low_freq_factor
    shortest = rope.original_positions / rope.high_freq_factor
    wavelength = 2 * math.pi / plain
    stretched = torch.where(wavelength > longest, plain / rope.factor, plain)
    share = (rope.original_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smooth = (1 - share) * stretched / rope.factor + share * stretched
    return torch.where((wavelength >= shortest) & (wavelength <= longest), smooth, stretched)


def _yarn(rope: RopeSpec, head_dim: int) -> Tensor:
    """Dimensions that turn often within the pretrained length are kept, those that turn rarely are stretched."""

    def dimension(turns: float) -> float:
        """Which dimension makes that many turns within the pretrained length."""
        return head_dim * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # no division by zero
    stretched_share = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept_share = 1 - stretched_share
    powers = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return 1.0 / (rope.factor * powers) * (1 - kept_share) + 1.0 / powers * kept_share
