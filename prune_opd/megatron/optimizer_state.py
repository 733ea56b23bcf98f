"""Restoring megatron-core's distributed optimizer from a checkpoint when torch's Adam is inside it (no TE, no apex).

megatron-core then expects Adam's state to be there before it is loaded, does not know Adam's per-parameter `step` when
it copies the state in, and gives all parameters one `step` tensor, which Adam would count up once for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

# By whether any layout can load a checkpoint. If so, parameters and moments are whole tensors by name, for which every
# rank gathers those of its data-parallel group in its host's memory. If not, each rank writes the share that it holds,
# as it holds it: nothing is gathered or copied, and only the number of replicas may change.
CHECKPOINT_FORMATS: dict[bool, dict[str, Any]] = {
    True: {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,  # over the data-parallel group, not through gloo
        "chained_optim_avoid_prefix": True,
    },
    False: {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": False},
}


def prepare_to_load(optimizer: Any) -> None:
    """Give every parameter an Adam state to load into."""
    for part in _distributed_over_torch_adam(optimizer):
        for group in part.optimizer.param_groups:
            for weight in group["params"]:
                if not (state := part.optimizer.state[weight]):
                    moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
                    state.update(step=torch.zeros(()), **moments)


def load(optimizer: Any, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict`, for every optimizer of ours."""
    ours = list(_distributed_over_torch_adam(optimizer))
    for part in ours:
        part._set_main_param_and_optimizer_states = partial(_copy_states, part)
    optimizer.load_state_dict(state)
    for part in ours:
        for adam in part.optimizer.state.values():
            adam["step"] = adam["step"].clone()


def _distributed_over_torch_adam(optimizer: Any) -> Iterator[Any]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.Adam):
            yield part


def _copy_states(optimizer: Any, model_parameter: Tensor, tensors: dict[str, Tensor]) -> None:
    """megatron-core's method of this name, without asking for Adam's `step` (which is in the parameter groups)."""
    group, order = optimizer.model_param_group_index_map[model_parameter]
    main = optimizer.optimizer.param_groups[group]["params"][order]
    for name, there in {"param": main, **optimizer.optimizer.state[main]}.items():
        if name != "step":
            there.detach().copy_(tensors[name])
