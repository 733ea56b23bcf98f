"""megatron-core's forward-backward over this rank's chunks of a model, whatever its pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config
from torch import Tensor

from prune_opd.megatron.layout import ModelLayout
from prune_opd.megatron.packing import PackedBatch
from prune_opd.process import progress

# (micro-batches, chunk) -> (the chunk's output, what the last stage does with it)
ForwardStep = Callable[[Iterator[PackedBatch], Any], tuple[Tensor, Callable[..., Any]]]


def forward_backward(
    models: Sequence[torch.nn.Module], layout: ModelLayout, batches: Sequence[PackedBatch], step: ForwardStep
) -> list[Any]:
    """What the loss function reports of each micro-batch, on the last stage; an empty list on the others.

    All ranks of a pipeline go through the same micro-batches, in the same order.
    """
    return _run(models, layout, batches, step, forward_only=False)


@torch.no_grad()
def forward(
    models: Sequence[torch.nn.Module],
    layout: ModelLayout,
    batches: Sequence[PackedBatch],
    use: Callable[[PackedBatch, Tensor], Any],
) -> list[Any]:
    """`use(batch, hidden_NH)` of each micro-batch, on the last stage; an empty list on the others. No gradients."""

    def step(iterator: Iterator[PackedBatch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(iterator)
        return model(batch), lambda hidden_NH, non_loss_data: use(batch, hidden_NH)

    return _run(models, layout, batches, step, forward_only=True, collect_non_loss_data=True)


def _run(
    models: Sequence[torch.nn.Module],
    layout: ModelLayout,
    batches: Sequence[PackedBatch],
    step: ForwardStep,
    **options: bool,
) -> list[Any]:
    pipelined = layout.pp > 1
    all_passes, begun = len(batches) * len(models), count(1)

    def told(batches: Iterator[PackedBatch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        number = next(begun)  # that this process has handed to the device: it does not wait to know more
        progress(lambda: f"micro-batch {number}/{all_passes}")
        return step(batches, model)

    run = get_forward_backward_func(pp_size=layout.pp, vp_size=layout.vp if layout.vp > 1 else None)
    config = get_model_config(models[0])
    return run(
        forward_step_func=told,
        data_iterator=[iter(batches) for _ in models],
        model=list(models),
        num_microbatches=len(batches),
        seq_length=max(len(batch.ids_N) for batch in batches),
        micro_batch_size=1,
        p2p_communicator=P2PCommunicator(pp_group=layout.groups.pp, config=config) if pipelined else None,
        pg_collection=layout.groups,
        **options,
    )
