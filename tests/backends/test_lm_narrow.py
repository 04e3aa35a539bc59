import pytest
import torch
from tiny_lm import (
    assert_same,
    gradients,
    labelled_batch,
    opened,
    tiny_models,
)
from torch import nn
from treelora_backends.causal_lm.network.network import LmNetwork


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_models(tmp_path_factory.mktemp("narrow"))


def plainly(base, compute):
    """Compute with the last feed-forward layer as the model has it."""
    kept, base.lm._narrow = base.lm._narrow, None
    try:
        return compute()
    finally:
        base.lm._narrow = kept


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_leaving_out_what_is_not_read_changes_neither_loss_nor_gradients(models, family, targets):
    base = opened(models[family], targets=targets)
    batch = labelled_batch()
    assert base.lm._narrow is not None
    wanted = plainly(base, lambda: base.lm.loss(batch))
    ours = base.lm.loss(batch)
    torch.testing.assert_close(ours, wanted)
    assert_same(gradients(base, ours), gradients(base, wanted))


def test_the_last_feed_forward_layer_sees_the_positions_that_are_read_and_is_itself_again_afterwards(models):
    base = opened(models["llama"])
    batch = labelled_batch()
    last = base.lm._narrow
    seen = []
    hook = last.gate_proj.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].shape[:2]))
    base.lm.loss(batch)
    assert seen == [(1, 6)]
    assert "forward" not in vars(last)
    base.lm.logits_at(batch.batch, batch.rows, batch.columns)
    hook.remove()
    assert seen[1:] == [(3, 9)]


class Mixing(nn.Module):
    """A layer in which positions see each other."""

    def forward(self, states):
        return states + states.mean(dim=1, keepdim=True)


class Pair(nn.Module):
    """A layer that gives more than states."""

    def forward(self, states):
        return states, None


@pytest.mark.parametrize("kind", [Mixing, Pair])
def test_layers_that_are_not_position_by_position_run_as_they_are(models, kind):
    base = opened(models["llama"], targets="auto")
    model = base.lm.model
    if kind is Mixing:
        model.model.layers[3].mlp = Mixing()
    else:
        model.model.layers[3].mlp = Pair()
        model.model.layers[3].mlp.register_forward_hook(lambda _m, _i, out: out[0])
    assert LmNetwork(model, base.layers)._narrow is None


def test_gradient_checkpointing_runs_the_layer_as_it_is(models):
    base = opened(models["llama"])
    batch = labelled_batch()
    wanted = plainly(base, lambda: gradients(base, base.lm.loss(batch)))
    base.lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    base.network.train()
    assert_same(gradients(base, base.lm.loss(batch)), wanted)
