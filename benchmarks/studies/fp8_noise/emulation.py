"""FP8 matrix products emulated on any machine, rounded as Transformer Engine's forward pass on Hopper rounds.

Inputs and weights of the linear layers are scaled, rounded to e4m3 (torch.float8_e4m3fn) and scaled back; their product
is formed in fp32 from exactly those values, as the tensor cores accumulate it. Forward only: `hybrid` differs from
`e4m3` in the gradients alone. Left out: the order of the sums, and FP8 attention, which no recipe here has.

Scales, as in Transformer Engine 2.11:
    tensorwise   448 / largest |value| of the tensor
    delayed      448 / largest |value| in the history of earlier calls; 1 at the first call; what is above saturates
    blockwise    of each 1 × 128 values of an input and 128 × 128 of a weight, rounded down to a power of two
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0
BLOCK = 128


def round_e4m3(x: Tensor, scale: Tensor | float) -> Tensor:
    """The nearest e4m3 numbers to x · scale, over scale, in fp32; beyond ±448 / scale they saturate."""
    scaled = (x.float() * scale).clamp(-E4M3_MAX, E4M3_MAX)
    return scaled.to(torch.float8_e4m3fn).float() / scale


def tensorwise(x: Tensor) -> Tensor:
    return round_e4m3(x, _scale(x.float().abs().amax()))


def blockwise(x_NK: Tensor, rows: int) -> Tensor:
    """Blocks of `rows` × 128 of a matrix; at the edges they are smaller."""
    height, width = x_NK.shape
    padded = F.pad(x_NK.float(), (0, -width % BLOCK, 0, -height % rows))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, rows))  # [N / rows, rows, K / 128, 128]
    scale = _scale(blocks.abs().amax(dim=(1, 3), keepdim=True))
    rounded = round_e4m3(blocks, torch.exp2(torch.floor(torch.log2(scale))))
    return rounded.flatten(2).flatten(0, 1)[:height, :width]


def _scale(amax: Tensor) -> Tensor:
    return torch.where(amax > 0, E4M3_MAX / amax, torch.ones_like(amax))


class Recipe:
    """How inputs and weights are rounded. `delayed` remembers the largest values of each input, by its layer."""

    def __init__(self, name: str, amax_history: int = 1024) -> None:
        self.name = name
        self._history: dict[object, deque[float]] = defaultdict(lambda: deque(maxlen=amax_history))

    def weight(self, weight_OK: Tensor) -> Tensor:
        """A weight does not change while we look, so from the second call on a delayed scale is a tensor's own."""
        return blockwise(weight_OK, BLOCK) if self.name == "blockwise" else tensorwise(weight_OK)

    def input(self, x_NK: Tensor, layer: object) -> Tensor:
        if self.name == "blockwise":
            return blockwise(x_NK, 1)
        if self.name == "tensorwise":
            return tensorwise(x_NK)
        history = self._history[layer]
        scale = E4M3_MAX / max(history) if history and max(history) > 0 else 1.0
        history.append(float(x_NK.abs().max()))
        return round_e4m3(x_NK, scale)


@contextmanager
def emulated(model: Any, recipe: Recipe, bf16_ends: int = 0) -> Iterator[None]:
    """Within this context the linear layers of the decoder multiply as in FP8. TP = 1, forward only.

    bf16_ends: so many layers at the start, and at the end, are left alone. The head is not part of the model's pass.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    layers = model.decoder.layers[bf16_ends : len(model.decoder.layers) - bf16_ends]
    kinds = ColumnParallelLinear | RowParallelLinear
    linears = [module for layer in layers for module in layer.modules() if isinstance(module, kinds)]
    for linear in linears:
        linear.forward = _product(linear, recipe)
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward  # the class's own is there again


def _product(linear: Any, recipe: Recipe) -> Callable[..., tuple[Tensor, Tensor | None]]:
    weight_OK = recipe.weight(linear.weight.detach())

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        rounded = recipe.input(x.flatten(0, -2), linear).view_as(x)
        y = F.linear(rounded, weight_OK).to(x.dtype)
        if linear.bias is None or linear.skip_bias_add:
            return y, linear.bias
        return y + linear.bias, None

    return forward
