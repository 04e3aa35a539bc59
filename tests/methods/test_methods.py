"""Each contender against its defining equation, by hand or by brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from treelora_cli.backend import adapters
from treelora_cli.backend.adapters import SLOT, AdapterWeights
from treelora_cli.errors import ModelError
from treelora_cli.methods.base import Method, StepView, TaskContext
from treelora_cli.methods.ewc import Ewc
from treelora_cli.methods.gem import Gem, project
from treelora_cli.methods.inflora import InfLora, Subspace, input_grams
from treelora_cli.methods.ogd import Ogd, extended, projected_off
from treelora_cli.methods.olora import OLora
from treelora_cli.methods.seqlora import SeqLora

LAYERS = ("first", "second")
SCALE = 2.0
seeds = st.integers(0, 2**32 - 1)


class Two(nn.Module):
    """Two layers, of ``nn.Linear`` or of GPT-2's transposed kind."""

    def __init__(self, transposed: bool = False, dims: tuple[int, int, int] = (6, 5, 4)) -> None:
        super().__init__()
        wide, middle, narrow = dims
        self.first: nn.Module = Conv1D(middle, wide) if transposed else nn.Linear(wide, middle)
        self.second: nn.Module = Conv1D(narrow, middle) if transposed else nn.Linear(middle, narrow)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Problem:
    """A network with a slot, and regression tasks on it."""

    def __init__(
        self, transposed: bool = False, dims: tuple[int, int, int] = (6, 5, 4), rank: int = 2, tasks: int = 10
    ) -> None:
        torch.manual_seed(0)
        self.network = adapters.attach(Two(transposed, dims), LAYERS, rank=rank, alpha=SCALE * rank, dropout=0.0)
        self.slot = adapters.slot_parameters(self.network, LAYERS)
        self.dims, self.tasks = dims, tasks

    def fresh(self, seed: int) -> AdapterWeights:
        return adapters.reference_point(self.network, LAYERS, SCALE, seed)

    def losses(self, seed: int) -> Callable[[int], Iterator[Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(5, 3, self.dims[0], generator=generator)
        targets = torch.randn(5, 3, self.dims[2], generator=generator)

        def draw(count: int) -> Iterator[Tensor]:
            for x, y in list(zip(inputs, targets, strict=True))[:count]:
                yield (self.network(x) - y).square().mean()

        return draw

    def task(self, index: int, losses: Callable[[int], Iterator[Tensor]] | None = None) -> TaskContext:
        losses = losses or self.losses(index)
        fresh = self.fresh(index)
        return TaskContext(index, self.network, LAYERS, self.slot, SCALE, fresh, losses, tasks=self.tasks)

    def view(self, step: int = 0) -> StepView:
        return StepView(step, 10, 5, 0.05, self.slot)

    def train(self, method: Method, task: TaskContext, steps: int = 8) -> None:
        """Begin, train with AdamW and weight decay as the trainer does, end."""
        adapters.write_slot(self.network, method.begin(task))
        optimizer = torch.optim.AdamW(self.flat(), lr=0.05, weight_decay=0.1)
        for step in range(steps):
            view = self.view(step)
            loss = torch.stack(list(task.losses(5))).mean()
            penalty = method.penalty(view, loss)
            optimizer.zero_grad(set_to_none=True)
            (loss if penalty is None else loss + penalty).backward()
            method.before_step(view)
            optimizer.step()
            method.after_step(view)
        method.end(task)

    def gradients(self) -> Tensor:
        return torch.cat([p.grad.flatten() for pair in self.slot for p in pair if p.grad is not None])

    def flat(self) -> list[nn.Parameter]:
        return [p for pair in self.slot for p in pair]

    def parameters(self) -> list[Tensor]:
        return [p.detach().clone() for pair in self.slot for p in pair]


def random_weights(problem: Problem, seed: int) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    down = tuple(torch.randn(a.shape, generator=generator) for a, _ in problem.slot)
    up = tuple(torch.randn(b.shape, generator=generator) for _, b in problem.slot)
    return AdapterWeights(LAYERS, down, up, SCALE)


def same(first: AdapterWeights, second: AdapterWeights) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.down + first.up, second.down + second.up, strict=True))


# -- sequential LoRA --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [SeqLora, Ewc, Ogd, Gem])
def test_one_adapter_is_carried_on(make: Callable[[], Method]) -> None:
    problem, method = Problem(), make()
    task = problem.task(0)
    assert same(method.begin(task), task.fresh)
    problem.train(method, task)
    trained = adapters.read_slot(problem.network, LAYERS, SCALE)
    adapters.write_slot(problem.network, random_weights(problem, 7))  # an evaluation may use the slot in between
    assert same(method.begin(problem.task(1)), trained)


def test_sequential_lora_changes_nothing_of_a_step() -> None:
    problem, method = Problem(), SeqLora()
    problem.train(method, problem.task(0))
    loss = next(problem.losses(1)(1))
    assert method.penalty(problem.view(), loss) is None
    loss.backward()
    gradients, parameters = problem.gradients(), problem.parameters()
    method.before_step(problem.view())
    method.after_step(problem.view())
    assert torch.equal(problem.gradients(), gradients)
    assert all(torch.equal(a, b) for a, b in zip(problem.parameters(), parameters, strict=True))
    assert method.kept_bytes() == 0


# -- folding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_folding_keeps_the_function_exactly(transposed: bool) -> None:
    problem = Problem(transposed)
    with torch.no_grad():  # small integers, for which float32 arithmetic is exact whatever its order
        for parameter in problem.network.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape))
    x = torch.randint(-3, 4, (7, 6)).float()
    before, held = problem.network(x), problem.network.get_submodule("base_model.model.first").get_base_layer().weight
    pointer = held.data_ptr()
    adapters.fold_slot(problem.network, LAYERS, SCALE)
    assert torch.equal(problem.network(x), before)
    assert held.data_ptr() == pointer, "in place"
    with adapters.base_only(problem.network):
        assert torch.equal(problem.network(x), before), "the update is in the frozen weights"
    assert all(not up.any() for _, up in problem.slot)


def test_folding_into_half_precision_rounds_once() -> None:
    problem = Problem()
    adapters.write_slot(problem.network, random_weights(problem, 3))
    module = problem.network.get_submodule("base_model.model.first")
    module.get_base_layer().to(torch.bfloat16)
    weight = module.get_base_layer().weight
    whole = weight.float() + random_weights(problem, 3).update(0)
    adapters.fold_slot(problem.network, LAYERS, SCALE)
    assert torch.equal(weight, whole.bfloat16())


def test_folding_refuses_quantised_weights() -> None:
    problem = Problem()
    layer = problem.network.get_submodule("base_model.model.second").get_base_layer()
    layer.weight = nn.Parameter(torch.zeros(4, 5, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match="'second' is quantised"):
        adapters.fold_slot(problem.network, LAYERS, SCALE)


@pytest.mark.parametrize("make", [OLora, InfLora])
def test_earlier_adapters_stay_in_force(make: Callable[[], Method]) -> None:
    problem, method, x = Problem(), make(), torch.randn(3, 6)
    plain = problem.network(x)
    before_end: list[Tensor] = []
    end = method.end

    def noted(task: TaskContext) -> None:
        before_end.append(problem.network(x))
        end(task)

    method.end = noted  # type: ignore[method-assign]
    problem.train(method, problem.task(0))
    torch.testing.assert_close(problem.network(x), before_end[0])
    assert not torch.allclose(plain, before_end[0])
    adapters.write_slot(problem.network, method.begin(problem.task(1)))
    torch.testing.assert_close(problem.network(x), before_end[0])


# -- EWC --------------------------------------------------------------------------------------------------


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


# -- O-LoRA -----------------------------------------------------------------------------------------------


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


# -- OGD --------------------------------------------------------------------------------------------------


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


# -- GEM --------------------------------------------------------------------------------------------------


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


# -- InfLoRA ----------------------------------------------------------------------------------------------


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


def test_a_slot_is_what_the_tests_take_it_for() -> None:
    problem = Problem()
    assert problem.network.get_submodule("base_model.model.first").scaling[SLOT] == SCALE
