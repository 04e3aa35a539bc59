"""O-LoRA: the orthogonality term by hand, and reached in training."""

from __future__ import annotations

import pytest
import torch
from small_problem import Problem, same

from treelora_cli.methods.olora import OLora


def test_the_orthogonality_term_by_hand() -> None:
    problem, method = Problem(dims=(2, 2, 2), rank=1), OLora(reg=0.5)

    def set_down(first: list[float], second: list[float]) -> None:
        with torch.no_grad():
            for (down, up), row in zip(problem.slot, (first, second), strict=True):
                down.copy_(torch.tensor([row]))
                up.fill_(1.0)

    assert method.penalty(problem.view(), torch.tensor(1.0)) is None
    set_down([1.0, 2.0], [0.0, 1.0])
    method.end(problem.task(0))
    set_down([-1.0, 1.0], [3.0, 0.0])
    method.end(problem.task(1))
    set_down([2.0, 1.0], [1.0, -4.0])
    term = method.penalty(problem.view(), torch.tensor(1.0))
    # first layer: |1*2 + 2*1| + |-1*2 + 1*1| = 5; second: |0*1 + 1*-4| + |3*1 + 0*-4| = 7
    assert term.item() == pytest.approx(0.5 * 12)
    term.backward()
    # d/da of |a_i . a| is sign(a_i . a) a_i: (1, 2) - (-1, 1), and -(0, 1) + (3, 0)
    assert problem.slot[0][0].grad.tolist() == [[1.0, 0.5]]
    assert problem.slot[1][0].grad.tolist() == [[1.5, -0.5]]
    assert problem.slot[0][1].grad is None, "only down is pushed"
    assert method.kept_bytes() == 2 * 2 * 2 * 4  # tasks, layers, entries, bytes


def test_orthogonality_is_reached_in_training() -> None:
    overlap = []
    for reg in (0.0, 0.5):
        problem, method = Problem(dims=(16, 12, 4)), OLora(reg=reg)
        problem.train(method, problem.task(0))
        earlier = [one.clone() for one in method._earlier]
        problem.train(method, problem.task(1), steps=60)
        later = [one[2:] for one in method._earlier]
        overlap.append(sum(float((a @ b.T).abs().sum()) for a, b in zip(earlier, later, strict=True)))
    assert overlap[1] < 0.3 * overlap[0]


def test_each_task_has_a_new_adapter() -> None:
    problem, method = Problem(), OLora()
    problem.train(method, problem.task(0))
    assert same(method.begin(problem.task(1)), problem.fresh(1))
