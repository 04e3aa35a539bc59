"""Elastic weight consolidation: the Fisher diagonal and the penalty by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_problem import Problem, random_weights, seeds
from torch import Tensor

from treelora_cli.backend import adapters
from treelora_cli.methods.ewc import Ewc


def test_the_fisher_diagonal_by_hand() -> None:
    problem, method = Problem(dims=(1, 1, 1), rank=1), Ewc(reg=3.0)
    (down, up), _ = problem.slot
    with torch.no_grad():
        down.fill_(2.0)
        up.fill_(5.0)

    def losses(count: int) -> Iterator[Tensor]:
        yield 3.0 * down.sum() + 1.0 * up.sum()
        yield -1.0 * down.sum() + 2.0 * up.sum()

    method.end(problem.task(0, losses))
    # means of (9, 1) and of (1, 4); the second layer has no gradient
    assert method._fisher.tolist() == pytest.approx([5.0, 2.5, 0.0, 0.0])
    with torch.no_grad():
        down.fill_(2.5)
        up.fill_(4.0)
    penalty = method.penalty(problem.view(), torch.tensor(1.0))
    assert penalty.item() == pytest.approx(3.0 / 2 * (5.0 * 0.25 + 2.5 * 1.0))
    penalty.backward()
    assert (float(down.grad), float(up.grad)) == pytest.approx((3.0 * 5.0 * 0.5, 3.0 * 2.5 * -1.0))


def test_ewc_is_silent_on_the_first_task_and_counts_what_it_keeps() -> None:
    problem, method = Problem(), Ewc()
    assert method.penalty(problem.view(), torch.tensor(1.0)) is None
    assert method.kept_bytes() == 0
    problem.train(method, problem.task(0))
    size = sum(p.numel() for pair in problem.slot for p in pair)
    assert method.kept_bytes() == 2 * 4 * size
    problem.train(method, problem.task(1))
    assert method.kept_bytes() == 2 * 4 * size, "as much for any number of tasks"


@given(seeds, st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_one_accumulated_penalty_is_the_sum_of_the_tasks_up_to_a_constant(seed: int, tasks: int) -> None:
    problem, method = Problem(), Ewc(reg=2.0)
    kept = []
    for index in range(tasks):
        adapters.write_slot(problem.network, random_weights(problem, seed + index))
        task = problem.task(index)
        gradients = [torch.autograd.grad(one, problem.flat()) for one in task.losses(20)]
        squares = [torch.cat([part.flatten() for part in parts]).square() for parts in gradients]
        kept.append((torch.stack(squares).mean(dim=0), torch.cat([p.flatten() for p in problem.parameters()])))
        method.end(task)

    def at(position: int) -> tuple[float, float]:
        adapters.write_slot(problem.network, random_weights(problem, seed + 100 + position))
        theta = torch.cat([p.flatten() for p in problem.parameters()]).double()
        separate = sum(float((f.double() * (theta - t).square()).sum()) for f, t in kept)
        return method.penalty(problem.view(), torch.tensor(1.0)).item(), separate

    ours, separate = zip(*(at(position) for position in range(3)), strict=True)
    for other in (1, 2):
        assert ours[other] - ours[0] == pytest.approx(separate[other] - separate[0], rel=1e-3, abs=1e-3 * separate[0])


def test_ewc_holds_an_important_parameter() -> None:
    free, held = Problem(), Problem()
    for problem, reg in ((free, 0.0), (held, 1e6)):
        method = Ewc(reg=reg)
        problem.train(method, problem.task(0))
        problem.start = torch.cat([p.flatten() for p in problem.parameters()])
        problem.fisher = method._fisher
        problem.train(method, problem.task(1), steps=20)
    moved = [
        float((p.fisher * (torch.cat([q.flatten() for q in p.parameters()]) - p.start).square()).sum())
        for p in (free, held)
    ]
    assert moved[1] < 0.1 * moved[0]
