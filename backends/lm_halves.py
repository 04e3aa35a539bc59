"""Steps whose frozen linear layers multiply in bf16, and nothing else does.

On a CPU this is faster than autocast: weights are cast once and not at every use, and attention, whose gradient takes
several times as long in bf16 there, stays in float32; so do adapters, norms and the states between layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from treelora_backends.lm_forwards import standing_in


class HalfWeights:
    """Copies of the frozen linear layers' weights, two bytes a number.

    Args:
        modules: Where to look for such layers.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        inner = {id(one): one for module in modules for one in module.modules()}
        layers = [one for one in inner.values() if type(one) is nn.Linear and _is_frozen(one)]
        self._pairs = [(layer, _multiplication(layer)) for layer in layers]

    def used(self) -> AbstractContextManager[None]:
        """Return the context in which the layers multiply with the copies."""
        return standing_in(self._pairs)


def _is_frozen(layer: nn.Linear) -> bool:
    return layer.weight.dtype == torch.float32 and not any(one.requires_grad for one in layer.parameters())


def _multiplication(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight = layer.weight.detach().bfloat16()
    bias = None if layer.bias is None else layer.bias.detach().bfloat16()

    def forward(inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs.bfloat16(), weight, bias).to(inputs.dtype)

    return forward
