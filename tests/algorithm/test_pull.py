"""Facts about eq. 3's term and the proximal step, by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora_cli.algorithm.pull import (
    deviation,
    normaliser,
    penalty,
    ramp,
    soft_threshold_,
)


def test_deviation_is_the_l1_distance_over_all_tensors() -> None:
    current = [torch.tensor([1.0, -2.0]), torch.tensor([[3.0]])]
    target = [torch.tensor([0.5, 1.0]), torch.tensor([[3.0]])]
    assert float(deviation(current, target)) == 0.5 + 3.0


def test_penalty_by_hand() -> None:
    current = [[torch.tensor([1.0, 3.0])], [torch.tensor([2.0])]]
    target = [[torch.tensor([2.0, 2.0])], [torch.tensor([-4.0])]]
    # layers: |1| + |1| over 4, and 6 over 4; times 0.1 * 0.5 * 8
    value = penalty(current, target, torch.tensor(8.0), strength=0.1, ramp=0.5)
    assert float(value) == pytest.approx(0.4 * (0.5 + 1.5))


@given(seed=st.integers(0, 1000), given_norms=st.booleans())
def test_all_layers_at_once_are_the_sum_of_each(seed: int, given_norms: bool) -> None:
    torch.manual_seed(seed)
    shapes = [[(2, 3), (4, 2)], [(1,)], [(3, 3), (2,)]]
    current = [[torch.randn(shape, requires_grad=True) for shape in layer] for layer in shapes]
    target = [[torch.randn(shape) for shape in layer] for layer in shapes]
    norms = [normaliser(layer) for layer in target] if given_norms else None
    value = penalty(current, target, torch.tensor(2.0), 0.5, 0.25, norms)
    each = [deviation(ours, theirs) / normaliser(theirs) for ours, theirs in zip(current, target, strict=True)]
    wanted = 2.0 * 0.5 * 0.25 * torch.stack(each).sum()
    torch.testing.assert_close(value, wanted)
    parts = [part for layer in current for part in layer]
    for one, other in zip(torch.autograd.grad(value, parts), torch.autograd.grad(wanted, parts), strict=True):
        torch.testing.assert_close(one, other)


def test_update_by_hand() -> None:
    # w - a * (grad loss + grad penalty), loss = w^2 at 3, target 4: normaliser 4
    weight = torch.tensor([3.0], requires_grad=True)
    loss = (weight**2).sum()
    total = loss + penalty([[weight]], [[torch.tensor([4.0])]], loss, strength=0.5, ramp=1.0)
    (grad,) = torch.autograd.grad(total, weight)
    # 2 * 3 from the loss, 0.5 * 9 / 4 towards the target; none through the scale
    assert float(grad) == pytest.approx(6.0 - 1.125)


def test_gradient_is_zero_where_adapters_are_equal_and_bounded_beside() -> None:
    target = torch.tensor([1.0, -1.0])
    for offset, expected in ((0.0, 0.0), (1e-6, 0.25), (-1e-6, -0.25)):
        current = (target + offset).requires_grad_()
        value = penalty([[current]], [[target]], torch.tensor(1.0), strength=0.5, ramp=1.0)
        (grad,) = torch.autograd.grad(value, current)
        assert grad.tolist() == [expected, expected]


def test_a_zero_target_does_not_blow_up() -> None:
    current = torch.full((10,), 0.01, requires_grad=True)
    value = penalty([[current]], [[torch.zeros(10)]], torch.tensor(1.0), strength=1.0, ramp=1.0)
    (grad,) = torch.autograd.grad(value, current)
    assert float(normaliser([torch.zeros(10)])) == pytest.approx(0.01)
    assert float(value.detach()) == pytest.approx(0.1 / 0.01)
    assert grad.tolist() == pytest.approx([100.0] * 10)


def test_no_gradient_reaches_the_target_or_the_loss() -> None:
    current = torch.ones(2, requires_grad=True)
    target = torch.zeros(2, requires_grad=True)
    loss = torch.tensor(2.0, requires_grad=True)
    value = penalty([[current]], [[target]], loss, strength=1.0, ramp=1.0)
    grads = torch.autograd.grad(value, (current, target, loss), allow_unused=True)
    assert [grad is None for grad in grads] == [False, True, True]


def test_penalty_of_nothing_is_zero() -> None:
    current = [[torch.ones(2)]]
    assert float(penalty([], [], torch.tensor(3.0), strength=1.0, ramp=1.0)) == 0.0
    zero = penalty(current, [[torch.zeros(2)]], torch.tensor(3.0), strength=1.0, ramp=0.0)
    assert float(zero) == 0.0


def test_no_strength_is_no_pull_and_known_norms_are_taken_as_they_are() -> None:
    current, target, loss = [[torch.tensor([1.0, 3.0])]], [[torch.tensor([2.0, 2.0])]], torch.tensor(8.0)
    assert float(penalty(current, target, loss, strength=0.0, ramp=1.0)) == 0.0
    assert float(penalty(current, target, loss, 0.5, 1.0, [torch.tensor(16.0)])) == 0.5 * 8 * 2 / 16


def test_targets_lie_anywhere_and_the_term_lies_with_the_loss() -> None:
    there = torch.device("meta")
    ours, theirs = [[torch.ones(2, device=there)]], [[torch.zeros(2)]]
    assert penalty(ours, theirs, torch.tensor(1.0, device=there), 0.5, 1.0).device == there
    assert penalty(theirs, [[torch.ones(2)]], torch.tensor(1.0, device=there), 0.5, 1.0).device == there
    assert deviation(ours[0], theirs[0]).device == there


def test_ramp_is_linear_then_one() -> None:
    assert [ramp(step, 4) for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    with pytest.raises(ValueError, match="got -1 and 4"):
        ramp(-1, 4)
    with pytest.raises(ValueError, match="got 0 and 0"):
        ramp(0, 0)


def test_soft_threshold_by_hand() -> None:
    current = torch.tensor([1.0, 1.25, 1.5, 0.0])
    target = torch.tensor([1.0, 1.0, 1.0, 1.0])
    soft_threshold_([current], [target], 0.25)
    assert current.tolist() == [1.0, 1.0, 1.25, 0.25]


def test_soft_threshold_changes_a_trained_parameter_in_place() -> None:
    parameter = torch.nn.Parameter(torch.tensor([2.0, 0.1]))
    before = parameter.data_ptr()
    soft_threshold_([parameter], [torch.zeros(2)], 0.5)
    assert parameter.tolist() == [1.5, 0.0]
    assert parameter.requires_grad
    assert parameter.data_ptr() == before


@given(
    values=st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=20),
    offset=st.floats(-3, 3, width=32),
    threshold=st.floats(0, 2, width=32),
)
@settings(max_examples=60, deadline=None)
def test_soft_threshold_lands_exactly_and_never_overshoots(
    values: list[float], offset: float, threshold: float
) -> None:
    start = torch.tensor(values)
    target = torch.full_like(start, offset)
    current = start.clone()
    soft_threshold_([current], [target], threshold)
    within = (start - target).abs() <= threshold
    assert torch.equal(current[within], target[within])
    assert bool(((current - target).abs() <= (start - target).abs() + 1e-6).all())
    assert bool(((current - target) * (start - target) >= -1e-6).all())
    moved = (start - current).abs()[~within]
    torch.testing.assert_close(moved, torch.full_like(moved, threshold), atol=1e-5, rtol=0)


def test_half_precision_lands_exactly_on_the_target() -> None:
    target = torch.randn(50, generator=torch.Generator().manual_seed(0)).bfloat16()
    current = target + 0.001
    soft_threshold_([current], [target], 0.05)
    assert torch.equal(current, target.to(current))


def test_mismatches_are_refused() -> None:
    one, two = [torch.ones(1)], [torch.ones(2)]
    with pytest.raises(ValueError, match=r"shapes differ: current \[\(1,\)\], target \[\(2,\)\]"):
        deviation(one, two)
    with pytest.raises(ValueError, match="layers differ: 1 current, 2 target"):
        penalty([one], [one, one], torch.tensor(1.0), 1.0, 1.0)
    with pytest.raises(ValueError, match="strength: expected 0 or more, got -1"):
        penalty([one], [one], torch.tensor(1.0), -1.0, 1.0)
    with pytest.raises(ValueError, match=r"ramp: expected a value in \[0, 1\], got 2"):
        penalty([one], [one], torch.tensor(1.0), 1.0, 2.0)
    with pytest.raises(ValueError, match="soft threshold: expected 0 or more, got nan"):
        soft_threshold_(one, one, float("nan"))
