"""Frozen linear layers that multiply in bf16 while everything else stays as it is."""

from __future__ import annotations

import pytest
import torch
from conftest import plain_runtime
from torch import nn
from treelora_backends.causal_lm.network.halves import HalfWeights, Passes


def network() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3, bias=False))
    for parameter in made[0].parameters():
        parameter.requires_grad_(False)
    return made


@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_layer_multiplies_in_bf16_and_gives_the_type_it_got(bias: bool) -> None:
    layer = nn.Linear(6, 8, bias=bias).requires_grad_(False)
    inputs = torch.randn(5, 6)
    plain = layer(inputs)
    with HalfWeights([layer]).used():
        half = layer(inputs)
    own = None if layer.bias is None else layer.bias.bfloat16()
    wanted = nn.functional.linear(inputs.bfloat16(), layer.weight.bfloat16(), own)
    assert half.dtype == torch.float32 and torch.equal(half, wanted.float())
    assert not torch.equal(half, plain)
    assert torch.equal(layer(inputs), plain), "outside, the layer is as it was"


def test_layers_that_learn_are_left_alone_and_gradients_pass() -> None:
    made, inputs = network(), torch.randn(5, 6, requires_grad=True)
    loss = made(inputs).square().sum()
    wanted = torch.autograd.grad(loss, [inputs, made[2].weight])
    halves = HalfWeights([made, made[0]])
    with halves.used():
        assert "forward" in vars(made[0]) and "forward" not in vars(made[2])
        found = torch.autograd.grad(made(inputs).square().sum(), [inputs, made[2].weight])
    assert not vars(made[0]).get("forward")
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        assert nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.999


def test_a_stand_in_that_was_there_comes_back() -> None:
    layer = nn.Linear(6, 8).requires_grad_(False)
    layer.forward = lambda inputs: inputs * 0
    with HalfWeights([layer]).used():
        assert layer(torch.ones(1, 6)).abs().sum() > 0
    assert layer(torch.ones(1, 6)).abs().sum() == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_passes_without_gradients_keep_bf16_where_it_was_chosen(precision: str) -> None:
    runtime = plain_runtime()
    runtime.compute_as({"precision": "fp32", "forward_precision": precision})
    layer, inputs = nn.Linear(6, 8).requires_grad_(False), torch.randn(5, 6)
    passes = Passes(runtime, [layer])
    with passes.without_gradients():
        assert not torch.is_grad_enabled()
        assert ("forward" in vars(layer)) == (precision == "bf16")
        given = layer(inputs)
    assert given.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert "forward" not in vars(layer) and torch.is_grad_enabled()
    torch.testing.assert_close(given.float(), layer(inputs), rtol=2e-2, atol=2e-2)
