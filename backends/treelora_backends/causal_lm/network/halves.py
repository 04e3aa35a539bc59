"""Frozen linear layers that multiply in bf16 with weights that are cast once, and not at every use.

On a CPU this is faster than autocast alone. In steps nothing else is bf16: attention, whose gradient takes several
times as long in bf16 there, stays in float32, and so do adapters, norms and the states between layers. Passes without
gradients are under autocast, too, and what the layers give stays in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn

from treelora_backends.standing_in import standing_in
from treelora_cli.backend.runtime import Runtime
from treelora_cli.backend.shards import is_released


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


class Passes:
    """The arithmetic of passes without gradients.

    Args:
        runtime: Knows what was chosen for them.
        modules: Frozen layers that run in them often.
    """

    def __init__(self, runtime: Runtime, modules: Sequence[nn.Module]) -> None:
        self._runtime = runtime
        self._modules = modules

    @cached_property
    def _halves(self) -> HalfWeights | None:
        wanted = self._runtime.forward_precision == "bf16" and self._runtime.device.type == "cpu"
        return HalfWeights(self._modules) if wanted else None

    @contextmanager
    def without_gradients(self) -> Iterator[None]:
        """Return the context of such a pass."""
        halves = nullcontext() if self._halves is None else self._halves.used()
        with torch.no_grad(), self._runtime.autocast(), halves:
            yield


def _is_frozen(layer: nn.Linear) -> bool:
    if is_released(layer.weight):
        return False  # processes hold it together: a copy would hold it here as a whole
    return layer.weight.dtype == torch.float32 and not any(one.requires_grad for one in layer.parameters())


def _multiplication(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight = layer.weight.detach().bfloat16()
    bias = None if layer.bias is None else layer.bias.detach().bfloat16()

    def forward(inputs: Tensor) -> Tensor:
        product = nn.functional.linear(inputs.bfloat16(), weight, bias)
        return product if torch.is_autocast_enabled(inputs.device.type) else product.to(inputs.dtype)

    return forward
