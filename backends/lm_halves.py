"""Steps whose frozen linear layers multiply in bf16, and nothing else does.

On a CPU this is faster than autocast: weights are cast once and not at every use, and attention, whose gradient takes
several times as long in bf16 there, stays in float32; so do adapters, norms and the states between layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


class HalfWeights:
    """Copies of the frozen linear layers' weights, two bytes a number.

    Args:
        modules: Where to look for such layers.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        inner = {id(one): one for module in modules for one in module.modules()}
        self._layers = [one for one in inner.values() if type(one) is nn.Linear and _is_frozen(one)]
        self._forwards = [_multiplication(layer) for layer in self._layers]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within, the layers multiply with the copies."""
        before = [vars(layer).get("forward") for layer in self._layers]
        for layer, forward in zip(self._layers, self._forwards, strict=True):
            cast("Any", layer).forward = forward
        try:
            yield
        finally:
            for layer, forward in zip(self._layers, before, strict=True):
                del cast("Any", layer).forward
                if forward is not None:
                    cast("Any", layer).forward = forward


def _is_frozen(layer: nn.Linear) -> bool:
    return layer.weight.dtype == torch.float32 and not any(one.requires_grad for one in layer.parameters())


def _multiplication(layer: nn.Linear) -> Any:
    weight = layer.weight.detach().bfloat16()
    bias = None if layer.bias is None else layer.bias.detach().bfloat16()

    def forward(inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs.bfloat16(), weight, bias).to(inputs.dtype)

    return forward
