"""The pull towards the nearest earlier task's adapter: as a loss term and as a proximal step.

Pure tensor code, no model. A layer's adapter is a sequence of tensors (`A` and `B`), in the same
order for both tasks.

Loss term, for layers `l` with adapter `theta_l` and target `theta*_l`:

    strength * ramp * stop_gradient(loss) * sum over l of |theta_l - theta*_l|_1 / normaliser_l

`normaliser_l` is the target's own L1 norm (with a floor), a constant: the term measures deviation
as a share of the target's size. Dividing by the deviation itself instead would make the term's
value constant and its gradient grow without bound as the adapters meet; here the gradient is
bounded, and zero where they are equal.

Source: TreeLoRA eq. 3; the published code scales to the task loss and ramps over the epoch as here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

# Mean absolute value per entry below which a target no longer sets the scale.
_NORMALISER_FLOOR = 1e-3


def deviation(current: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """L1 distance of one layer's adapter to the target's.

    Args:
        current: the new task's parameters, any shapes; gradients flow into them.
        target: the selected task's, same shapes; treated as constants.

    Returns:
        float32 scalar, in parameter units; its gradient is the sign of each entry's deviation, 0
        where equal.

    Raises:
        ValueError: the numbers of tensors or their shapes differ, or there are none.
    """
    _check_same_shapes(current, target)
    gaps = [_gap(ours, theirs).abs().sum() for ours, theirs in _pairs(current, target)]
    return torch.stack(gaps).sum()


def normaliser(target: Sequence[Tensor]) -> Tensor:
    """L1 norm of a layer's target adapter, at least 0.001 per entry; float32 scalar, constant."""
    size = sum(part.numel() for part in target)
    norm = torch.stack([part.detach().float().abs().sum() for part in target]).sum()
    return norm.clamp_min(_NORMALISER_FLOOR * size)


def penalty(
    current_by_layer: Sequence[Sequence[Tensor]],
    target_by_layer: Sequence[Sequence[Tensor]],
    loss: Tensor,
    strength: float,
    ramp: float,
    normalisers: Sequence[Tensor] | None = None,
) -> Tensor:
    """The regulariser of eq. 3, to be added to the task loss.

    All layers are computed at once: a GPU takes longer to start a kernel than to work through an adapter.

    Args:
        current_by_layer: `D` layers of the new adapter.
        target_by_layer: `D` layers of the selected tasks' adapters, constants.
        loss: scalar task loss; sets the scale, no gradient flows into it.
        strength: lambda, 0 or more.
        ramp: in [0, 1], see `ramp`.
        normalisers: `D` scalars, `normaliser` of each target, where they are known from earlier steps.

    Returns:
        float32 scalar; 0 without layers.

    Raises:
        ValueError: layers or shapes do not match, or `strength` or `ramp` is out of range.

    Source: TreeLoRA eq. 3.
    """
    if len(current_by_layer) != len(target_by_layer):
        counts = f"{len(current_by_layer)} current, {len(target_by_layer)} target"
        raise ValueError(f"penalty: numbers of layers differ: {counts}")
    if not strength >= 0.0:
        raise ValueError(f"penalty strength: expected 0 or more, got {strength}")
    if not 0.0 <= ramp <= 1.0:
        raise ValueError(f"penalty ramp: expected a value in [0, 1], got {ramp}")
    scale = strength * ramp * loss.detach().float()
    for current, target in zip(current_by_layer, target_by_layer, strict=True):
        _check_same_shapes(current, target)
    if not current_by_layer:
        return scale * 0
    ours = _flat(current_by_layer)
    theirs = _flat(target_by_layer).detach().to(ours.device)
    norms = [normaliser(target) for target in target_by_layer] if normalisers is None else normalisers
    weights = torch.stack([norm.to(ours.device) for norm in norms]).reciprocal()  # (D,)
    sizes = tuple(sum(part.numel() for part in layer) for layer in current_by_layer)
    each = weights.repeat_interleave(_on(sizes, ours.device), output_size=sum(sizes))
    return scale * ((ours - theirs).abs() * each).sum().to(scale.device)


def _flat(layers: Sequence[Sequence[Tensor]]) -> Tensor:
    """All entries of all layers one after the other, float32."""
    return torch.cat([part.reshape(-1).float() for layer in layers for part in layer])


@lru_cache(maxsize=16)
def _on(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers that every step needs on the device."""
    return torch.tensor(numbers, device=device)


def ramp(step: int, total: int) -> float:
    """Linear ramp over an epoch, from 0 at step 0 to 1 at step `total` and after.

    Raises:
        ValueError: `total` below 1 or a negative step.
    """
    if total < 1 or step < 0:
        raise ValueError(f"ramp: expected step >= 0 and total >= 1, got {step} and {total}")
    return min(1.0, step / total)


@torch.no_grad()
def soft_threshold_(current: Sequence[Tensor], target: Sequence[Tensor], threshold: float) -> None:
    """Proximal step of the L1 deviation, in place: shrink each entry's deviation by `threshold`.

    An entry within the threshold becomes exactly the target's, so that what stays different is
    sparse. To be called after the optimizer's step.

    Args:
        current: parameters, changed in place.
        target: same shapes.
        threshold: in parameter units, 0 or more. For plain gradient descent the step that matches
            `penalty` is its gradient times the learning rate; an optimizer that normalises its
            gradients, such as Adam, moves every entry by about the learning rate, and calls for a
            threshold that is a share of it.

    Raises:
        ValueError: shapes differ, or the threshold is negative or not a number.

    Source: TreeLoRA eq. 3 as a proximal step; this is this project's.
    """
    _check_same_shapes(current, target)
    if not threshold >= 0.0:
        raise ValueError(f"soft threshold: expected 0 or more, got {threshold}")
    for ours, theirs in _pairs(current, target):
        gap = _gap(ours, theirs)
        shrunk = ours.float() - gap.sign() * threshold
        ours.copy_(torch.where(gap.abs() <= threshold, theirs.to(ours), shrunk.to(ours.dtype)))


def _pairs(current: Sequence[Tensor], target: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Tensors of both sides, one by one."""
    return list(zip(current, target, strict=True))


def _gap(ours: Tensor, theirs: Tensor) -> Tensor:
    """Deviation of one tensor in float32, the target a constant on the same device."""
    return ours.float() - theirs.detach().to(ours.device).float()


def _check_same_shapes(current: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    """Raise ValueError unless both sides hold tensors of equal shapes."""
    ours = [tuple(part.shape) for part in current]
    theirs = [tuple(part.shape) for part in target]
    if ours != theirs or not ours:
        raise ValueError(f"adapter shapes differ: current {ours}, target {theirs}")
