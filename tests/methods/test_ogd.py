"""Orthogonal gradient descent: projections by hand and for any input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_problem import Problem, seeds

from treelora_cli.methods.ogd import Ogd, extended, projected_off


def test_a_projected_gradient_by_hand() -> None:
    stored = extended(None, torch.tensor([3.0, 4.0, 0.0]))
    assert stored.tolist() == [pytest.approx([0.6, 0.8, 0.0])]
    # (5, 0, 2) has 3 along (0.6, 0.8, 0)
    assert projected_off(torch.tensor([5.0, 0.0, 2.0]), stored).tolist() == pytest.approx([3.2, -2.4, 2.0])


@given(seeds, st.integers(1, 12), st.integers(2, 30), st.floats(1e-6, 1e6))
@settings(max_examples=60, deadline=None)
def test_stored_gradients_are_orthonormal_and_span_them_all(seed: int, count: int, size: int, unit: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(max(1, size // 3), size, generator=generator)
    gradients = unit * torch.randn(count, len(basis), generator=generator) @ basis  # often dependent
    stored = None
    for gradient in gradients:
        stored = extended(stored, gradient)
    assert stored is not None
    torch.testing.assert_close(stored @ stored.T, torch.eye(len(stored)), atol=1e-5, rtol=0)
    assert len(stored) <= min(count, len(basis))
    rest = torch.stack([projected_off(gradient, stored) for gradient in gradients])
    # what was taken for dependent may leave a thousandth
    assert float(rest.norm(dim=1).max()) <= 2e-3 * float(gradients.norm(dim=1).max())


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_the_step_gradient_is_orthogonal_to_every_stored_one(seed: int) -> None:
    problem, method = Problem(), Ogd(per_task=3)
    for index in range(2):
        problem.train(method, problem.task(index), steps=2)
    assert method._stored.shape[0] == 6
    next(problem.losses(seed)(1)).backward()
    before = problem.gradients()
    method.before_step(problem.view())
    after = problem.gradients()
    assert float((method._stored @ after).abs().max()) <= 1e-5 * float(before.norm())
    expected = before - method._stored.T @ (method._stored @ before)
    torch.testing.assert_close(after, expected, atol=1e-5 * float(before.norm()), rtol=0)
    assert method.kept_bytes() == 6 * len(before) * 4


def test_gradients_without_size_are_not_stored() -> None:
    assert extended(None, torch.zeros(3)) is None
    stored = extended(None, torch.tensor([0.0, 1.0]))
    assert extended(stored, torch.tensor([0.0, -2.0])) is stored
