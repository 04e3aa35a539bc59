"""Liger's fused linear cross-entropy, where ``liger_kernel`` is installed and the model is on a CUDA device.

Source: Liger-Kernel (Hsu et al., 2024), ``LigerFusedLinearCrossEntropyLoss``. ``ahead.py`` is the same in plain torch.

Symbols: ``M`` labelled positions, ``C`` width.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

FusedLoss = Callable[[Tensor, Tensor, float], Tensor]
"""From states (M, C), the tokens that follow (M,) and the smoothing of labels to their mean cross-entropy."""
_TRIAL_POSITIONS = 6
_MODULE = "liger_kernel"


def fused_loss(head: nn.Module | None, device: torch.device) -> FusedLoss | None:
    """Return Liger's loss behind an output layer; ``None`` where it is not installed or does not fit.

    Args:
        head: The output layer: only a frozen linear one fits.
        device: Of the model: only CUDA fits.
    """
    if device.type != "cuda" or type(head) is not nn.Linear or importlib.util.find_spec(_MODULE) is None:
        return None
    weight, bias = head.weight, head.bias
    if not weight.is_floating_point() or weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    loss = _behind(weight, bias)
    return loss if _agrees(loss, head) else None


def _behind(weight: Tensor, bias: Tensor | None) -> FusedLoss:
    def loss(states: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        made: Any = importlib.import_module(f"{_MODULE}.transformers").LigerFusedLinearCrossEntropyLoss
        return cast("Tensor", made(label_smoothing=smoothing)(weight, states.to(weight.dtype), targets, bias))

    return loss


def _agrees(loss: FusedLoss, head: nn.Linear) -> bool:
    """Return whether loss and gradient of a few states are those of plain torch; found once, by comparison."""
    drawn = torch.Generator().manual_seed(0)
    states = torch.randn(_TRIAL_POSITIONS, head.in_features, generator=drawn).to(head.weight)
    targets = torch.arange(_TRIAL_POSITIONS, device=states.device) % head.out_features

    def both(one: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = states.clone().requires_grad_()
        value = one(leaf)
        return value.detach().float(), torch.autograd.grad(value, leaf)[0].float()

    with torch.enable_grad(), torch.autocast(states.device.type, enabled=False):
        plain = both(lambda some: nn.functional.cross_entropy(head(some).float(), targets))
        try:
            fused = both(lambda some: loss(some, targets, 0.0))
        except Exception:  # kernels that are built here and now fail in many ways; plain torch remains
            return False
    scale = float(plain[1].abs().max())
    value_agrees = torch.allclose(fused[0], plain[0], rtol=1e-2, atol=1e-3)
    return value_agrees and float((fused[1] - plain[1]).abs().max()) <= 2e-2 * scale
