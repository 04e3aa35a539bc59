"""Gradient episodic memory: projections by hand, by brute force, for any input."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_problem import Problem, seeds
from torch import Tensor

from treelora_cli.methods.gem import Gem, project


def closest_by_brute_force(gradient: np.ndarray[Any, Any], memory: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The projection on a polyhedral cone: the best feasible projection on a face."""
    best, best_gap = None, np.inf
    for size in range(len(memory) + 1):
        for face in itertools.combinations(range(len(memory)), size):
            rows = memory[list(face)]
            z = gradient - np.linalg.pinv(rows) @ (rows @ gradient) if size else gradient
            gap = float(np.sum((gradient - z) ** 2))
            if (memory @ z >= -1e-9).all() and gap < best_gap:
                best, best_gap = z, gap
    assert best is not None
    return best


@given(seeds, st.integers(1, 5), st.integers(1, 8), st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_projected_gradient_is_feasible_and_the_closest(seed: int, tasks: int, size: int, twins: bool) -> None:
    rng = np.random.default_rng(seed)
    memory = rng.standard_normal((tasks, size))
    if twins:
        memory[-1] = memory[0]
    gradient = rng.standard_normal(size)
    found = project(torch.tensor(gradient), torch.tensor(memory)).numpy()
    assert (memory @ found).min() >= -1e-8
    np.testing.assert_allclose(found, closest_by_brute_force(gradient, memory), atol=1e-7)


def test_a_projection_by_hand() -> None:
    # (-1, 2) against the memory (1, 0): the half-plane's nearest point is (0, 2)
    memory = torch.tensor([[1.0, 0.0]])
    assert project(torch.tensor([-1.0, 2.0]), memory).tolist() == [0.0, 2.0]
    # the dual variable is 1 there; a margin of 3 raises it to 3
    assert project(torch.tensor([-1.0, 2.0]), memory, margin=3.0).tolist() == [2.0, 2.0]
    assert project(torch.tensor([-1.0, 2.0]), memory, margin=0.5).tolist() == [0.0, 2.0]


@given(seeds, st.integers(1, 6), st.floats(0.0, 2.0), st.floats(1e-6, 1e3))
@settings(max_examples=60, deadline=None)
def test_every_constraint_holds_with_any_margin_and_unit(seed: int, tasks: int, margin: float, unit: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    memory = unit * torch.randn(tasks, 40, generator=generator)
    gradient = unit * torch.randn(40, generator=generator)
    found = project(gradient, memory, margin)
    least = float(((memory / memory.norm(dim=1, keepdim=True)) @ found).min())
    assert least >= -1e-4 * float(gradient.norm() + margin * memory.norm(dim=1).sum())


def test_gem_changes_a_gradient_only_where_a_memory_would_suffer() -> None:
    problem, method = Problem(), Gem(batches=2, margin=0.0)
    problem.train(method, problem.task(0))
    own = [torch.autograd.grad(one, problem.flat()) for one in problem.losses(0)(2)]
    memory = torch.stack([torch.cat([g.flatten() for g in grads]) for grads in own]).mean(dim=0)

    def step_gradient(towards: float) -> tuple[Tensor, Tensor]:
        for pair in problem.slot:
            for parameter in pair:
                parameter.grad = None
        (towards * torch.stack(list(problem.losses(0)(2))).mean() + next(problem.losses(5)(1)) * 1e-3).backward()
        before = problem.gradients()
        method.before_step(problem.view())
        return before, problem.gradients()

    before, after = step_gradient(1.0)
    assert torch.equal(before, after)
    before, after = step_gradient(-1.0)
    expected = before - memory * (memory @ before) / (memory @ memory)
    torch.testing.assert_close(after, expected, atol=1e-6, rtol=1e-4)


def test_gem_counts_its_examples() -> None:
    problem, method = Problem(), Gem(batches=2)
    assert method.kept_bytes() == 0
    problem.train(method, problem.task(0))
    problem.train(method, problem.task(1))
    assert method.kept_bytes() == 2 * 2 * (3 * 6) * 4  # tasks, batches, entries, bytes
