"""The teacher pass: forward only, and only the last hidden states are kept (idea 3 of the design)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from prune_opd.megatron.layout import Layout
from prune_opd.megatron.model import build
from prune_opd.megatron.packing import PackedBatch


class Teacher:
    """A frozen model: no gradients, no optimizer, no DDP buffers."""

    def __init__(self, model_dir: str | Path, layout: Layout, dtype: torch.dtype, device: torch.device):
        self.model = build(model_dir, layout.tp_size, dtype, trainable=False).to(device)

    @torch.no_grad()
    def hidden(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """teacher_hidden_MH of each micro-batch: the positions that predict a response token, in order."""
        return [self.model(batch)[batch.predicting_M] for batch in batches]

    @property
    def head_weight(self) -> Tensor:
        return self.model.head_weight()
