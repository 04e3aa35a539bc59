"""Gradients taken in the forward pass, and the few widths of batches on a GPU: the losses are the plain ones."""

import json
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_lm import assert_same, gradients, labelled_batch, opened, tiny_models
from torch import nn
from treelora_backends.causal_lm import batches
from treelora_backends.causal_lm.batches import padded, width_for
from treelora_backends.causal_lm.network.ahead import mean_cross_entropy
from treelora_backends.objective import summed_in_parts

from treelora_cli.backend.values import DataRequest, Memory

CUDA = torch.device("cuda")
"""Only its name is used here."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_models(tmp_path_factory.mktemp("ahead"))


# -- cross-entropy --------------------------------------------------------------------------------


class Head(nn.Linear):
    """A frozen output layer that counts the positions whose logits it gives."""

    def __init__(self, width, vocabulary):
        super().__init__(width, vocabulary)
        self.requires_grad_(False)
        self.positions = 0

    def forward(self, states):
        self.positions += len(states)
        return super().forward(states)


@pytest.mark.parametrize("at_once", [1, 4, 11, 100])
def test_loss_and_gradient_are_the_plain_ones_and_logits_are_computed_once(at_once):
    torch.manual_seed(0)
    head, targets = Head(8, 50), torch.randint(50, (11,))
    states = torch.randn(11, 8, requires_grad=True)
    wanted = nn.functional.cross_entropy(nn.functional.linear(states, head.weight, head.bias), targets)
    (plain,) = torch.autograd.grad(3 * wanted, states)
    loss = mean_cross_entropy(states, targets, head, at_once)
    (found,) = torch.autograd.grad(3 * loss, states)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-8)
    assert head.positions == 11


def test_the_gradient_is_numerically_the_derivative():
    torch.manual_seed(0)
    head, targets = Head(3, 7).double(), torch.tensor([0, 6, 2])
    states = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda given: mean_cross_entropy(given, targets, head, 2), [states])


def test_without_gradients_none_is_taken():
    head, states = Head(8, 50), torch.randn(5, 8)
    seen = []

    def logits_of(some):
        seen.append(some.requires_grad)
        return head(some)

    loss = mean_cross_entropy(states, torch.arange(5), logits_of, 2)
    assert seen == [False] * 3 and not loss.requires_grad
    with torch.no_grad():
        assert not mean_cross_entropy(states.requires_grad_(), torch.arange(5), logits_of, 2).requires_grad


def test_bf16_states_get_bf16_gradients_near_the_plain_ones():
    torch.manual_seed(0)
    head, targets = Head(16, 40).bfloat16(), torch.randint(40, (9,))
    states = torch.randn(9, 16, dtype=torch.bfloat16, requires_grad=True)
    logits = partial(lambda some: head(some).float())
    (plain,) = torch.autograd.grad(nn.functional.cross_entropy(logits(states), targets), states)
    (found,) = torch.autograd.grad(mean_cross_entropy(states, targets, logits, 4), states)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, plain, rtol=2e-2, atol=1e-4)


# -- parts ----------------------------------------------------------------------------------------


def test_a_sum_in_parts_has_the_gradient_of_the_sum_and_each_part_is_computed_once():
    torch.manual_seed(0)
    one, other, unused = (nn.Parameter(torch.randn(4)) for _ in range(3))
    computed = []

    def loss(place):
        computed.append(place)
        return (one * (place + 1)).square().sum() + (other.sum() if place else 0)

    losses = [partial(loss, place) for place in range(3)]
    plain = torch.stack([part() for part in losses]).sum()
    wanted = torch.autograd.grad(2 * plain, [one, other])
    computed.clear()
    total = summed_in_parts(losses, [one, other, unused])
    found = torch.autograd.grad(2 * total, [one, other, unused])
    torch.testing.assert_close(total, plain)
    assert_same(found[:2], wanted)
    assert not found[2].any()
    assert computed == [0, 1, 2]
    with torch.no_grad():
        assert float(summed_in_parts(losses, [one])) == pytest.approx(float(plain))


# -- widths ---------------------------------------------------------------------------------------


@given(longest=st.integers(1, 5000), most=st.integers(1, 8192))
def test_a_width_holds_the_text_and_wastes_little(longest, most):
    width = width_for(longest, CUDA, most)
    assert longest <= width <= max(longest, most)
    assert width - longest <= max(15, longest // 8)
    assert width % 16 == 0 or width == max(longest, most) or width == most
    assert width_for(width, CUDA, most) == width, "a width is its own"
    assert width_for(longest, torch.device("cpu"), most) == longest


def test_there_are_few_widths():
    widths = {width_for(longest, CUDA, 4096) for longest in range(1, 4097)}
    assert len(widths) == 16 + 8 * 4
    assert {one for one in widths if 512 < one <= 1024} == {576, 640, 704, 768, 832, 896, 960, 1024}


@pytest.mark.parametrize("left", [False, True])
def test_texts_are_padded_to_the_width_on_either_side(models, left, monkeypatch):
    monkeypatch.setattr(batches, "width_for", lambda longest, _device, most, **_few: width_for(longest, CUDA, most))
    encoder = opened(models["llama"]).encoder
    batch = padded(
        [torch.arange(3).int().numpy(), torch.arange(5).int().numpy()], encoder, torch.device("cpu"), left=left
    )
    assert batch.ids.shape == (2, 16)
    kept = slice(11, 16) if left else slice(0, 5)
    assert batch.mask[1, kept].tolist() == [1] * 5 and int(batch.mask.sum()) == 8
    assert batch.ids[1, kept].tolist() == [0, 1, 2, 3, 4]


def session_over(base, folder, count=60):
    rows = [
        {"prompt": "red " * (3 + place % 23), "answer": " ".join(["green"] * (1 + place % 3))} for place in range(count)
    ]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return base.session(base.read_task(DataRequest(folder / "texts.jsonl")), Memory((), dict), base.config)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_epoch_has_few_shapes_and_the_same_losses(models, family, tmp_path, monkeypatch):
    base = opened(models[family])
    session = session_over(base, tmp_path)
    session.prepare()
    steps = list(session.batches(0))
    seen = []
    plain_loss = base.lm.loss

    def noted(labelled, *rest):
        seen.append(tuple(labelled.batch.ids.shape))
        return plain_loss(labelled, *rest)

    monkeypatch.setattr(base.lm, "loss", noted)
    plain = [session.loss_of(step) for step in steps]
    plain_gradients = gradients(base, plain[0])
    shapes = set(seen)
    seen.clear()
    monkeypatch.setattr(batches, "width_for", lambda longest, _device, most, **_few: width_for(longest, CUDA, most))
    wide = [session.loss_of(step) for step in steps]
    assert_same(wide, plain)
    assert_same(gradients(base, wide[0]), plain_gradients)
    lengths = {width for _, width in seen}
    assert lengths <= {16, 32, 48, 64, 80, 96, 112, 128}
    assert len(set(seen)) <= 2 * len(lengths) < len(shapes), "sizes of batches differ by at most one"


def test_states_that_fit_nowhere_are_computed_again_as_they_would_have_been_kept(models, tmp_path, monkeypatch):
    base = opened(models["gpt2"])
    kept = session_over(base, tmp_path)
    kept.prepare()
    step = next(kept.batches(0))
    monkeypatch.setattr("treelora_backends.kept._free_on_disk", lambda: 0)
    anew = session_over(base, tmp_path)
    anew._keeping = type(anew._keeping).of(torch.device("cpu"), 0)
    anew.prepare()
    assert (kept.finish().facts["kept"]["place"], anew.finish().facts["kept"]["place"]) == ("memory", "nowhere")
    for block in base.lm.first_blocks(base.lm.cut):
        block.attn.resid_dropout.p = 0.5  # acts in the blocks that are trained only
    base.network.train()
    assert_same([anew.loss_of(step)], [kept.loss_of(step)])
    assert base.network.training
    assert_same(gradients(base, anew.loss_of(step)), gradients(base, kept.loss_of(step)))
    for block in base.lm.first_blocks(base.lm.cut):
        block.attn.resid_dropout.p = 0.0


def test_features_and_answers_are_those_of_narrow_batches(models, monkeypatch):
    base = opened(models["llama"])
    batch = labelled_batch().batch
    narrow = base.lm.read(batch).features(batch.lengths)
    scores = base.lm.label_log_likelihoods(batch, [[5, 6], [7]])
    wide = type(batch)(nn.functional.pad(batch.ids, (0, 7)), nn.functional.pad(batch.mask, (0, 7)))
    torch.testing.assert_close(base.lm.read(wide).features(wide.lengths), narrow, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(base.lm.label_log_likelihoods(wide, [[5, 6], [7]]), scores, rtol=1e-4, atol=1e-4)
