"""InfLoRA: the subspace of inputs by hand, and what stays fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_problem import LAYERS, Problem, random_weights, seeds
from torch import Tensor

from treelora_cli.backend import adapters
from treelora_cli.methods.base import TaskContext
from treelora_cli.methods.inflora import InfLora, Subspace, input_grams


def in_subspace(problem: Problem, columns: Tensor, seed: int) -> Callable[[int], Iterator[Tensor]]:
    """Losses of inputs that lie in the span of some columns."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(8, columns.shape[1], generator=generator) @ columns.T

    def draw(_count: int) -> Iterator[Tensor]:
        yield problem.network(inputs).square().mean()

    return draw


def test_input_grams_are_the_layers_own_inputs() -> None:
    problem = Problem()
    adapters.write_slot(problem.network, random_weights(problem, 1))
    x = torch.randn(4, 2, 6)
    grams = input_grams(problem.network, LAYERS, (problem.network(x).sum() for _ in range(2)))
    base = problem.network.get_base_model()
    hidden = torch.relu(base.first.base_layer(x)).flatten(0, 1)
    torch.testing.assert_close(grams[0].float(), 2 * x.flatten(0, 1).T @ x.flatten(0, 1))
    torch.testing.assert_close(grams[1].float(), (2 * hidden.T @ hidden).detach())
    with adapters.base_only(problem.network):
        expected = problem.network(x)
    assert not torch.allclose(problem.network(x), expected), "the slot is on again"


def test_the_subspace_and_down_by_hand() -> None:
    # inputs of squared norms 9, 4, 1 along the axes: 9 / 14 < 0.9 <= 13 / 14
    gram = torch.diag(torch.tensor([9.0, 4.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    empty = Subspace(torch.zeros(5, 0, dtype=torch.float64))
    down = empty.down(gram, 4)
    assert (down.abs() * 3**0.5).tolist() == [
        pytest.approx([1, 0, 0, 0, 0]),
        pytest.approx([0, 1, 0, 0, 0]),
        pytest.approx([0, 0, 1, 0, 0]),
        [0] * 5,
    ]
    two = empty.widened(gram, 0.9)
    assert not two.complement
    torch.testing.assert_close(two.basis @ two.basis.T, torch.diag(torch.tensor([1.0, 1, 0, 0, 0]).double()))
    # what is left of a new task's inputs lies along the third and fourth axes, 5 of 15 of its squared norm
    new = torch.diag(torch.tensor([10.0, 0.0, 3.0, 2.0, 0.0], dtype=torch.float64))
    assert two.down(new, 2).abs().argmax(dim=1).tolist() == [2, 3]
    # held: 10 of 15; three more make 13, short of 0.9; all five needed directions are more than half of the five
    four = two.widened(new, 0.9)
    assert four.complement
    assert four.basis.shape == (5, 1)
    assert four.off(torch.eye(5).double()).diagonal().tolist() == pytest.approx([0, 0, 0, 0, 1])
    # the complement is narrowed in turn: the fifth axis holds 2 of 10, and 0.9 need it
    assert four.widened(torch.diag(torch.tensor([8.0, 0, 0, 0, 2]).double()), 0.7).basis.shape == (5, 1)
    assert four.widened(torch.diag(torch.tensor([8.0, 0, 0, 0, 2]).double()), 0.9).basis.shape == (5, 0)


@given(seeds, st.integers(2, 12), st.lists(st.floats(0.05, 1.0), min_size=1, max_size=4), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_a_subspace_holds_the_share_and_down_stays_out(seed: int, size: int, shares: list[float], rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    subspace = Subspace(torch.zeros(size, 0, dtype=torch.float64))
    unit = torch.eye(size, dtype=torch.float64)
    for share in shares:
        inputs = torch.randn(rank, size, generator=generator, dtype=torch.float64)
        gram, old = inputs.T @ inputs, unit - subspace.off(unit)
        down = subspace.down(gram, rank).double()
        assert down.shape == (rank, size)
        assert float((down @ old).abs().max()) < 1e-6
        rows = down[down.norm(dim=1) > 0]
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)).double() / 3, atol=1e-5, rtol=0)
        subspace = subspace.widened(gram, share)
        torch.testing.assert_close(
            subspace.basis.T @ subspace.basis, torch.eye(subspace.basis.shape[1]).double(), atol=1e-9, rtol=0
        )
        now = unit - subspace.off(unit)
        held = float((now @ gram).trace() / gram.trace())
        assert held >= share - 1e-5
        assert float((now @ old - old).abs().max()) < 1e-6, "earlier tasks stay inside"
        assert subspace.basis.shape[1] <= size // 2 or not subspace.complement


def test_down_is_orthogonal_to_earlier_inputs_and_bitwise_fixed() -> None:
    problem, method = Problem(dims=(8, 9, 4), tasks=2), InfLora(threshold=0.99)
    axes = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
    first = problem.task(0, in_subspace(problem, axes[:, :3], seed=2))
    problem.train(method, first)
    old = [torch.eye(len(one.basis)).double() - one.off(torch.eye(len(one.basis)).double()) for one in method.subspaces]
    assert 1 <= round(float(old[0].trace())) <= 3

    second = problem.task(1, in_subspace(problem, axes[:, 1:6], seed=3))
    start = method.begin(second)
    assert all(float((down.double() @ one).abs().max()) < 1e-6 for down, one in zip(start.down, old, strict=True))
    assert all(not up.any() for up in start.up)
    assert float(start.down[0].norm()) > 0.5

    downs: list[Tensor] = []
    end = method.end

    def noted(task: TaskContext) -> None:
        downs.extend(down.detach().clone() for down, _ in problem.slot)
        assert all(up.any() for _, up in problem.slot)
        end(task)

    x = torch.randn(6, 3) @ axes[:, :3].T
    hidden = problem.network.get_base_model().first(x)
    method.end = noted  # type: ignore[method-assign]
    problem.train(method, second)
    assert all(torch.equal(a, b) for a, b in zip(downs, start.down, strict=True))
    # the first layer does not see the second task's update on the first task's inputs, but for what 0.99 leaves out
    moved = ((problem.network.get_base_model().first(x) - hidden).norm() / hidden.norm()).item()
    assert moved < 0.05
    assert method.kept_bytes() == sum(one.basis.nbytes for one in method.subspaces)


def test_the_share_rises_to_one_over_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, method = Problem(tasks=4), InfLora(threshold=0.6, batches=1)
    shares = []
    widened = Subspace.widened
    monkeypatch.setattr(
        Subspace, "widened", lambda self, gram, share: shares.append(share) or widened(self, gram, share)
    )
    for index in range(6):
        problem.train(method, problem.task(index), steps=1)
    assert shares[::2] == pytest.approx([0.6, 0.7, 0.8, 0.9, 1.0, 1.0])
