"""Adapted layers that add their update within its own multiplication.

PEFT multiplies, scales and adds one after the other; each writes a tensor as large as the layer's output, and reads it
again in the backward pass. Here one call does all three in the place of the frozen layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, cast

from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from treelora_backends.standing_in import standing_in


class AddedUpdates:
    """The plain LoRA layers within some modules; others run as they are.

    Plain is a frozen linear layer with one adapter, without bias, dropout or a variant of LoRA.

    Args:
        modules: Where to look for such layers.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        found = {id(one): one for module in modules for one in module.modules() if type(one) is LoraLinear}
        self._pairs: list[tuple[nn.Module, Callable[..., Any]]] = [
            (layer, _added(layer)) for layer in found.values() if _is_plain(layer)
        ]

    def used(self) -> AbstractContextManager[None]:
        """Return the context in which they run so; results are PEFT's up to rounding."""
        return standing_in(self._pairs)


def _is_plain(layer: LoraLinear) -> bool:
    if type(layer.base_layer) is not nn.Linear or layer.base_layer.weight.requires_grad or len(layer.lora_A) != 1:
        return False
    name = next(iter(layer.lora_A))
    factors = (layer.lora_A[name], layer.lora_B[name])
    drops = type(layer.lora_dropout[name]) is not nn.Identity
    return name not in layer.lora_variant and not drops and all(one.bias is None for one in factors)


def _added(layer: LoraLinear) -> Callable[..., Any]:
    name = next(iter(layer.lora_A))
    frozen, scale = layer.base_layer, layer.scaling[name]
    down, up = cast("nn.Linear", layer.lora_A[name]), cast("nn.Linear", layer.lora_B[name])

    def forward(inputs: Tensor, *others: Any, **named: Any) -> Any:
        if layer.disable_adapters or layer.merged or name not in layer.active_adapters or others or named:
            return LoraLinear.forward(layer, inputs, *others, **named)
        rows = inputs.reshape(-1, inputs.shape[-1])
        out = frozen(rows)
        low = down(rows.to(down.weight.dtype)).to(out.dtype)  # (rows, r)
        out = out.addmm_(low, up.weight.t().to(out.dtype), alpha=scale)
        return out.view(*inputs.shape[:-1], out.shape[-1])

    return forward
