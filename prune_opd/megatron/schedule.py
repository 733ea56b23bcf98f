"""megatron-core's forward-backward over this rank's chunks of a model, whatever its pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.utils import get_model_config
from torch import Tensor

from prune_opd.megatron.layout import ModelLayout
from prune_opd.megatron.packing import PackedBatch
from prune_opd.process import progress

# (micro-batches, chunk) -> (the chunk's output, what the last stage does with it)
ForwardStep = Callable[[Iterator[PackedBatch], Any], tuple[Tensor, Callable[..., Any]]]


class Messages(P2PCommunicator):
    """Tensors between neighbouring stages, whose shapes nobody has to ask for.

    All stages of a pipeline go through the same micro-batches, so each knows what it will get, in the order of
    megatron-core's schedule. megatron-core's own sends the shape before every tensor, and the host waits for it.
    """

    def __init__(self, layout: ModelLayout, config: Any, batches: Sequence[PackedBatch]) -> None:
        super().__init__(pp_group=layout.groups.pp, config=config)
        stage, shared = layout.groups.pp.rank(), layout.tp if layout.sequence_parallel else 1
        shapes = [[len(batch.ids_N) // shared, 1, config.hidden_size] for batch in batches]
        order = get_schedule_table(len(batches), layout.vp, layout.pp)
        # The first chunk of the first stage begins the model; it ends on the last stage, where the way back begins.
        self._inputs = iter([shapes[i] for i, chunk in order if chunk or stage])
        self._gradients = iter([shapes[i] for i, chunk in order if chunk or stage < layout.pp - 1])

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        nothing = [0, 0, 0]
        return next(self._inputs) if recv_prev else nothing, next(self._gradients) if recv_next else nothing


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
        p2p_communicator=Messages(layout, config, batches) if pipelined else None,
        pg_collection=layout.groups,
        **options,
    )
