"""Slots on plain linear layers: what PEFT's compute, in float32 bit for bit, without PEFT."""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn

from treelora_cli.backend import adapters
from treelora_cli.backend.adapters import AdapterWeights
from treelora_cli.backend.linear_slots import attach_linear

LAYERS = ("first", "deep.0")


class Two(nn.Module):
    """Two linear layers, one of them inside another module, and one that no slot is put on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.deep = nn.Sequential(nn.Linear(7, 6, bias=False), nn.GELU(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.deep(torch.relu(self.first(x)))


def both(dropout: float = 0.0) -> list[nn.Module]:
    """The same network with a slot of PEFT's and with one of ours."""
    found = []
    for attach in (adapters.attach, attach_linear):
        torch.manual_seed(0)
        found.append(attach(Two(), LAYERS, rank=2, alpha=6.0, dropout=dropout))
    return found


def some() -> AdapterWeights:
    torch.manual_seed(1)
    down, up = (torch.randn(2, 5), torch.randn(2, 7)), (torch.randn(7, 2), torch.randn(6, 2))
    return AdapterWeights(LAYERS, down, up, 3.0)


def test_the_parameters_have_peft_s_names_and_values_and_leave_the_generator_where_peft_leaves_it() -> None:
    states, drawn = [], []
    for attach in (adapters.attach, attach_linear):
        torch.manual_seed(0)
        network = attach(Two(), LAYERS, rank=2, alpha=6.0, dropout=0.0)
        drawn.append(torch.rand(1))
        states.append({name: (one.detach(), one.requires_grad) for name, one in network.named_parameters()})
    theirs, ours = states
    assert list(theirs) == list(ours) and torch.equal(*drawn)
    for name, (value, trained) in theirs.items():
        assert torch.equal(value, ours[name][0]) and trained == ours[name][1], name


def seen(network: nn.Module, x: Tensor, *, autocast: bool = False) -> list[Tensor]:
    """Outputs with the slot, without it and with its update in the frozen weights, and gradients."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = network(x)
        with adapters.base_only(network):
            plain = network(x)
        with adapters.added(network, some()):
            dense = network(x)
    output.float().square().sum().backward()
    slot = [one.grad for pair in adapters.slot_parameters(network, LAYERS) for one in pair]
    return [output, plain, dense, x.grad, *slot]


def test_outputs_and_gradients_are_peft_s() -> None:
    x, found = torch.randn(2, 3, 5), []
    for network in both():
        adapters.write_slot(network, some())
        found.append([*seen(network, x), network(x)])
    assert found[0][0].dtype == torch.float32
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not torch.equal(found[0][0], found[0][1])


def test_under_autocast_they_are_as_near_to_exact_ones_as_peft_s_and_of_the_same_types() -> None:
    torch.manual_seed(5)
    x, found = torch.randn(40, 3, 5), []
    for network in both():
        adapters.write_slot(network, some())
        found.append(seen(network, x, autocast=True))
        exact = seen(network.zero_grad() or network, x)
    assert found[1][0].dtype == torch.bfloat16
    assert torch.equal(found[0][1], found[1][1]), "without the slot they are the same"
    for theirs, ours, right in zip(*found, exact, strict=True):
        assert (theirs.dtype, theirs.shape) == (ours.dtype, ours.shape)
        off, peft_s = (ours.float() - right).norm() / right.norm(), (theirs.float() - right).norm() / right.norm()
        assert 0 < off < 0.02 and off < 2 * peft_s


def test_under_autocast_a_frozen_weight_that_changes_is_taken_as_it_is_now() -> None:
    network, x = both()[1], torch.randn(4, 5)
    adapters.write_slot(network, some())

    def answer() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return network(x).float()

    first = answer()
    with adapters.added(network, some()):
        answer()
    assert torch.equal(answer(), first)
    adapters.fold_slot(network, LAYERS, 3.0)
    assert torch.allclose(answer(), first, rtol=0.1, atol=0.1) and not torch.equal(answer(), first)
    network.load_state_dict({name: torch.zeros_like(one) for name, one in network.state_dict().items()})
    assert torch.equal(answer(), torch.zeros(4, 3))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        assert network(x).dtype == torch.float16


def test_dropout_draws_as_peft_s_does_and_only_in_training() -> None:
    x, found = torch.randn(64, 5), []
    for network in both(dropout=0.5):
        adapters.write_slot(network, some())
        torch.manual_seed(3)
        found.append((network.train()(x), network.eval()(x)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert not torch.equal(*found[0])


def test_folding_and_the_configuration_are_peft_s() -> None:
    x, found = torch.randn(4, 5), []
    for network in both():
        adapters.write_slot(network, some())
        config = adapters.peft_config(network, "base")
        adapters.fold_slot(network, LAYERS, 3.0)
        found.append((network(x), json.dumps(config, sort_keys=True)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_a_network_that_reads_its_layers_weights_finds_the_frozen_ones() -> None:
    plain, ours = both()[0].get_base_model(), both()[1].get_base_model()
    for name in LAYERS:
        one, other = plain.get_submodule(name), ours.get_submodule(name)
        assert torch.equal(one.weight, other.weight)
        assert one.bias is other.bias or torch.equal(one.bias, other.bias)


def test_without_its_adapter_inside_the_same_stays_without() -> None:
    network, x = both()[1], torch.randn(2, 5)
    adapters.write_slot(network, some())
    with adapters.base_only(network):
        plain = network(x)
        with adapters.base_only(network):
            pass
        assert torch.equal(network(x), plain)
    assert not torch.equal(network(x), plain)
