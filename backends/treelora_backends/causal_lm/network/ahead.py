"""Losses whose gradient is taken in the forward pass, piece by piece, so that no piece is kept or computed twice.

A vocabulary is wide, and the output layer is frozen: of its logits only the gradient with respect to the states is
needed, and each chunk's is known as soon as its logits are. A batch that does not fit at once is treated likewise.

Symbols: ``M`` labelled positions, ``C`` width, ``V`` vocabulary.

Source: the fused linear cross-entropy of Liger-Kernel (Hsu et al., 2024), in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn


def mean_cross_entropy(states: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor], at_once: int) -> Tensor:
    """Return the mean cross-entropy of the tokens (M,) that follow states (M, C).

    Args:
        states: The gradient flows into them.
        targets: Tokens.
        logits_of: Turns states (m, C) into float32 logits (m, V); nothing in it is trained.
        at_once: Positions whose logits are in memory at a time, 1 or more.
    """
    return cast("Tensor", _MeanCrossEntropy.apply(states, targets, logits_of, at_once))


def summed_in_parts(losses: Sequence[Callable[[], Tensor]], parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the sum of losses that are computed one after the other, each with its gradient.

    Args:
        losses: Compute a part of the loss, a scalar.
        parameters: All that is trained; the gradient flows into nothing else.
    """
    if not torch.is_grad_enabled():
        return torch.stack([loss() for loss in losses]).sum()
    return cast("Tensor", _SummedInParts.apply(losses, *parameters))


class _MeanCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor], most: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for some, tokens in zip(states.split(most), targets.split(most), strict=True):
            with torch.set_grad_enabled(wanted):
                leaf = some.detach().requires_grad_(wanted)
                loss = nn.functional.cross_entropy(logits_of(leaf), tokens, reduction="sum") / len(targets)
            if wanted:
                gradients += torch.autograd.grad(loss, [leaf])
            losses.append(loss.detach())
        if wanted:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None, None


class _SummedInParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Sequence[Callable[[], Tensor]], *parameters: Tensor) -> Tensor:
        values: list[Tensor] = []
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        for loss in losses:
            with torch.enable_grad():
                value = loss()
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total += gradient
            values.append(value.detach())
        ctx.save_for_backward(*sums)
        return torch.stack(values).sum()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(gradient * outer[0].to(gradient.dtype) for gradient in ctx.saved_tensors)
