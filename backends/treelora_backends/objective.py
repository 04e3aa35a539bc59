"""What a step minimises besides the method's term: smoothed labels, weighted classes, a batch in several parts.

Symbols: ``B`` examples, ``K`` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from treelora_cli.backend.runtime import Runtime


@dataclass(frozen=True)
class Objective:
    """How much of a label's probability is spread, and what each class counts.

    Attributes:
        smoothing: Share of the probability that is spread over all classes.
        weights: Factor on the loss of a class's examples, (K,), 1 on average over all examples; ``None`` for 1.
    """

    smoothing: float = 0.0
    weights: Tensor | None = None

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of logits (B, K) for labels (B,)."""
        if self.weights is None:
            return nn.functional.cross_entropy(logits, labels, label_smoothing=self.smoothing)
        losses = nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=self.smoothing)
        return (losses * self.weights[labels]).mean()

    def of_examples(self, labels: Tensor) -> Tensor | None:
        """Return the factor on each example's loss, (B,)."""
        return None if self.weights is None else self.weights[labels]


def class_weights(kind: str | None, labels: Tensor, classes: int, runtime: Runtime) -> Tensor | None:
    """Return what a class's example counts, (K,), over the examples of all processes; ``None`` for all alike.

    Args:
        kind: As ``train.class_weights``: ``balanced`` for ``n / (K n_c)``, so that each class counts as much in all.
        labels: Of this process's examples, (n,).
        classes: K.
        runtime: Processes.
    """
    if kind in (None, "none"):
        return None
    counts = runtime.sum(torch.bincount(labels, minlength=classes).to(labels.device, torch.float32))
    held = counts > 0
    return torch.where(held, counts.sum() / (held.sum() * counts.clamp(min=1)), 0.0)


def summed_in_parts(losses: Sequence[Callable[[], Tensor]], parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the sum of losses that are computed one after the other, each with its gradient.

    Args:
        losses: Compute a part of the loss, a scalar.
        parameters: All that is trained; the gradient flows into nothing else.
    """
    if not torch.is_grad_enabled():
        return torch.stack([loss() for loss in losses]).sum()
    return cast("Tensor", _SummedInParts.apply(losses, *parameters))


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
