"""Losses whose gradient is taken in the forward pass, piece by piece, so that no piece is kept or computed twice.

A vocabulary is wide, and the output layer is frozen: of its logits only the gradient with respect to the states is
needed, and each chunk's is known as soon as its logits are.

Symbols: ``M`` labelled positions, ``C`` width, ``V`` vocabulary.

Source: the fused linear cross-entropy of Liger-Kernel (Hsu et al., 2024), in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from treelora_backends.causal_lm.network.liger import FusedLoss, fused_loss

_LOGITS, _LOGITS_ELSEWHERE = {"cpu": 2**24}, 2**26
"""Logits in memory at a time; of a wide vocabulary those of few positions."""


class OutputLoss:
    """The loss behind a frozen output layer.

    Args:
        logits_of: Turns states (m, C) into float32 logits (m, V); nothing in it is trained.
        head: The output layer; ``None`` where the model does more to its logits.
        device: Of the model.
        vocabulary: V.

    Attributes:
        at_once: Positions whose logits are in memory at a time.
    """

    def __init__(
        self, logits_of: Callable[[Tensor], Tensor], head: nn.Module | None, device: torch.device, vocabulary: int
    ) -> None:
        self._logits_of = logits_of
        self._head = head
        self._device = device
        self.at_once = max(1, _LOGITS.get(device.type, _LOGITS_ELSEWHERE) // vocabulary)

    def __call__(
        self, states: Tensor, targets: Tensor, smoothing: float = 0.0, weights: Tensor | None = None
    ) -> Tensor:
        """Return the mean cross-entropy of the tokens (M,) that follow states (M, C), as ``mean_cross_entropy``.

        Liger's kernel takes what does not fit at once: it cuts by width and vocabulary, into many more pieces than are
        launched here for few positions, and knows no weights of positions.
        """
        if weights is None and len(targets) > self.at_once and self._fused is not None:
            return self._fused(states, targets, smoothing)
        return mean_cross_entropy(states, targets, self._logits_of, self.at_once, smoothing, weights)

    @cached_property
    def _fused(self) -> FusedLoss | None:
        return fused_loss(self._head, self._device)


def mean_cross_entropy(
    states: Tensor,
    targets: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    at_once: int,
    smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the mean cross-entropy of the tokens (M,) that follow states (M, C).

    Args:
        states: The gradient flows into them.
        targets: Tokens.
        logits_of: Turns states (m, C) into float32 logits (m, V); nothing in it is trained.
        at_once: Positions whose logits are in memory at a time, 1 or more.
        smoothing: Share of a token's probability that is spread over the vocabulary.
        weights: Factor on each position's loss, (M,); the mean divides by M all the same.
    """
    return cast("Tensor", _MeanCrossEntropy.apply(states, targets, logits_of, at_once, smoothing, weights))


class _MeanCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        targets: Tensor,
        logits_of: Callable[[Tensor], Tensor],
        most: int,
        smoothing: float,
        weights: Tensor | None,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        factors = [None] * -(-len(targets) // most) if weights is None else weights.split(most)
        for some, tokens, factor in zip(states.split(most), targets.split(most), factors, strict=True):
            with torch.set_grad_enabled(wanted):
                leaf = some.detach().requires_grad_(wanted)
                loss = _summed(logits_of(leaf), tokens, smoothing, factor) / len(targets)
            if wanted:
                gradients += torch.autograd.grad(loss, [leaf])
            losses.append(loss.detach())
        if wanted:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None, None, None, None


def _summed(logits: Tensor, tokens: Tensor, smoothing: float, factor: Tensor | None) -> Tensor:
    if factor is None:
        return nn.functional.cross_entropy(logits, tokens, reduction="sum", label_smoothing=smoothing)
    losses = nn.functional.cross_entropy(logits, tokens, reduction="none", label_smoothing=smoothing)
    return (losses * factor).sum()
