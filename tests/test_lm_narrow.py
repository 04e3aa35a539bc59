import pytest
import torch
from test_causal_lm import load, save_model
from torch import nn
from treelora_backends.lm_batches import Batch, LabelledBatch
from treelora_backends.lm_network import LmNetwork

from treelora_cli import adapters

NO_DROPOUT = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("narrow")
    settings = {"llama": {}, "gpt2": NO_DROPOUT}
    return {family: save_model(root / family, family, depth=4, **extra) for family, extra in settings.items()}


def opened(path, **adapter):
    base = load(path, blocks=3, dropout=0.0, **adapter)
    adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, 4.0, 0))
    torch.manual_seed(1)
    with torch.no_grad():
        for _, up in adapters.slot_parameters(base.network, base.layers):
            up.normal_(0, 0.1)
    return base


def labelled_batch():
    """Three texts of 9, 7 and 5 tokens; the last two, one and three of them are the answer."""
    torch.manual_seed(2)
    ids = torch.randint(4, 200, (3, 9))
    mask = (torch.arange(9) < torch.tensor([9, 7, 5])[:, None]).long()
    rows = torch.tensor([0, 0, 1, 2, 2, 2])
    columns = torch.tensor([6, 7, 5, 1, 2, 3])
    return LabelledBatch(Batch(ids, mask), rows, columns, ids[rows, columns + 1])


def gradients(base, loss):
    slot = adapters.slot_parameters(base.network, base.layers)
    return torch.autograd.grad(loss, [part for pair in slot for part in pair])


def assert_same(ones, others):
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


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
    assert (base.lm._narrow is not None) == (targets == "auto")
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
    base = opened(models["llama"])
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
