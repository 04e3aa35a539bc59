"""Adapted layers that add their update in one call: what PEFT gives, and its gradients."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from treelora_backends.added_updates import AddedUpdates


class Two(nn.Module):
    """Two linear layers, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5, bias=False), nn.Linear(5, 4)

    def forward(self, inputs):
        """Return the second layer's output."""
        return self.second(torch.tanh(self.first(inputs)))


def adapted(**options):
    torch.manual_seed(0)
    network = get_peft_model(Two(), LoraConfig(r=2, lora_alpha=6, target_modules=["first", "second"], **options))
    for name, one in network.named_parameters():
        if "lora_" in name:
            nn.init.normal_(one)
    return network


def outcome(network, inputs):
    """Return the output, and the gradients of the inputs and of every factor."""
    inputs = inputs.clone().requires_grad_()
    out = network(inputs)
    trained = [one for one in network.parameters() if one.requires_grad]
    return [out, *torch.autograd.grad(out.square().sum(), [inputs, *trained])]


@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 6)])
def test_output_and_gradients_are_pefts(shape):
    network = adapted().double()
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = outcome(network, inputs)
    with AddedUpdates([network]).used():
        ours = outcome(network, inputs)
    assert len(ours) == 2 + 4
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_scaling_and_update_are_added_by_hand():
    network, inputs = adapted().double(), torch.randn(3, 6, dtype=torch.float64)
    layer = network.base_model.model.first
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with AddedUpdates([network]).used():
        found = layer(inputs)
    torch.testing.assert_close(found, inputs @ (layer.base_layer.weight + 3 * up @ down).T)


def test_a_disabled_adapter_adds_nothing():
    network, inputs = adapted().double(), torch.randn(3, 6, dtype=torch.float64)
    with AddedUpdates([network]).used(), network.disable_adapter():
        found = network(inputs)
    torch.testing.assert_close(
        found, network.get_base_model().second.base_layer(torch.tanh(network.get_base_model().first.base_layer(inputs)))
    )


@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_layers_of_another_kind_run_as_they_are(options):
    network = adapted(**options)
    before = network.base_model.model.first.forward
    with AddedUpdates([network]).used():
        assert network.base_model.model.first.forward == before
