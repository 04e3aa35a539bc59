"""The slot's parameters and gradients as one vector.

Symbol: ``P`` parameters in the slot, all layers' ``down`` and ``up`` in network order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def parameters_of(slot: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> list[nn.Parameter]:
    """Return ``down`` and ``up`` of each layer, in order."""
    return [parameter for pair in slot for parameter in pair]


def flat_gradient(slot: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> Tensor:
    """Return the gradients now in the slot, float32 (P,); an absent one counts as zero."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters_of(slot)]
    return torch.cat([part.detach().float().flatten() for part in parts])


def set_gradient(slot: Sequence[tuple[nn.Parameter, nn.Parameter]], gradient: Tensor) -> None:
    """Replace the slot's gradients by those of a vector (P,)."""
    parameters = parameters_of(slot)
    parts = torch.split(gradient, [parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)


def loss_gradients(slot: Sequence[tuple[nn.Parameter, nn.Parameter]], losses: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield each loss's gradient in the slot, float32 (P,); the gradients that the slot holds stay."""
    parameters = parameters_of(slot)
    for loss in losses:
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
        yield torch.cat([part.detach().float().flatten() for part in parts])
