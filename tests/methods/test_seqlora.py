"""One adapter carried on, and earlier adapters folded into the base."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_problem import LAYERS, SCALE, Problem, random_weights, same
from torch import Tensor, nn

from treelora_cli.backend import adapters
from treelora_cli.backend.adapters import SLOT
from treelora_cli.errors import ModelError
from treelora_cli.methods.base import Method, TaskContext
from treelora_cli.methods.ewc import Ewc
from treelora_cli.methods.gem import Gem
from treelora_cli.methods.inflora import InfLora
from treelora_cli.methods.ogd import Ogd
from treelora_cli.methods.olora import OLora
from treelora_cli.methods.seqlora import SeqLora


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


def test_a_slot_is_what_the_tests_take_it_for() -> None:
    problem = Problem()
    assert problem.network.get_submodule("base_model.model.first").scaling[SLOT] == SCALE
