"""The teacher pass: forward only, and only the last hidden states are kept (idea 3 of the design)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from prune_opd.config import Fp8Config
from prune_opd.megatron.layout import Layout
from prune_opd.megatron.model import build
from prune_opd.megatron.packing import PackedBatch
from prune_opd.megatron.schedule import forward
from prune_opd.model_spec import ModelSpec
from prune_opd.precision import NO_FP8


class Teacher:
    """A frozen model: no gradients, no optimizer, no DDP buffers."""

    def __init__(
        self, model_dir: str | Path, layout: Layout, dtype: torch.dtype, device: torch.device, fp8: Fp8Config = NO_FP8
    ):
        self.layout = layout.teacher
        self.chunks = [chunk.to(device) for chunk in build(model_dir, self.layout, dtype, trainable=False, fp8=fp8)]

    @property
    def spec(self) -> ModelSpec:
        return self.chunks[0].spec

    def hidden(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """teacher_hidden_MH of each micro-batch: the positions that predict a response token, in order."""
        return forward(self.chunks, self.layout, batches, lambda batch, hidden_NH: hidden_NH[batch.predicting_M])

    @property
    def head_weight(self) -> Tensor:
        return self.chunks[-1].head_weight()
