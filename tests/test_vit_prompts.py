"""L2P and DualPrompt on a tiny transformer: the prompts' arithmetic, what is trained, and that it learns."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import MODEL, MODEL_ARGS
from torch import Tensor, nn
from treelora_backends.vit_prompts import L2P, DualPrompt, PromptLearner, PromptSettings, prefixed_block

QUICK = PromptSettings(
    epochs=20, batch_size=16, lr=0.02, pool=4, chosen=2, prompt_length=3, expert_length=4, expert_blocks=(1,),
    general_blocks=(0,),
)  # fmt: skip
MAKERS = [L2P, DualPrompt]


def network() -> nn.Module:
    """Random weights, in attention larger than at initialisation, so that tokens take note of one another."""
    torch.manual_seed(0)
    vit = timm.create_model(MODEL, num_classes=0, **MODEL_ARGS)
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.weight.mul_(8)
            block.attn.proj.weight.mul_(8)
    return vit


def task(seed: int, classes: int = 2, count: int = 32) -> tuple[Tensor, Tensor]:
    """Noisy images around one random image a class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 3, 16, 16, generator=generator)
    labels = torch.arange(count) % classes
    return centres[labels] + 0.3 * torch.randn(count, 3, 16, 16, generator=generator), labels


def test_an_empty_prefix_is_the_block_itself() -> None:
    block, tokens = network().eval().blocks[0], torch.randn(3, 5, 32)
    torch.testing.assert_close(prefixed_block(block, tokens, torch.zeros(3, 2, 0, 32)), block(tokens))


def test_a_prefix_by_hand() -> None:
    """Against one head's softmax over the prefix and the tokens, written out."""
    block, tokens, prefix = network().eval().blocks[0], torch.randn(2, 5, 32), torch.randn(2, 2, 3, 32)
    q, k, v = block.attn.qkv(block.norm1(tokens)).split(32, dim=-1)
    k, v = torch.cat([prefix[:, 0], k], dim=1), torch.cat([prefix[:, 1], v], dim=1)  # (2, 3 + 5, 32)
    mixed = []
    for head in (slice(0, 16), slice(16, 32)):
        weights = (q[..., head] @ k[..., head].transpose(1, 2) / 16**0.5).softmax(dim=-1)
        mixed.append(weights @ v[..., head])
    tokens_after = tokens + block.attn.proj(torch.cat(mixed, dim=-1))
    expected = tokens_after + block.mlp(block.norm2(tokens_after))
    torch.testing.assert_close(prefixed_block(block, tokens, prefix), expected)


def test_l2p_brings_the_prompts_of_the_nearest_keys() -> None:
    learner = L2P(network(), QUICK)
    queries = torch.zeros(1, 32)
    queries[0, 0] = 1.0
    with torch.no_grad():
        learner.keys.zero_()
        learner.keys[:, 0] = torch.tensor([1.0, -1.0, 0.0, 2.0])
        learner.keys[:, 1] = torch.tensor([1.0, 0.0, 1.0, 0.1])  # cosines 0.71, -1, 0, nearly 1
    _, distance = learner._prompted(torch.zeros(1, 3, 16, 16), queries, training=True)
    cosines = 2**-0.5 + 2 / (4 + 0.01) ** 0.5
    assert distance.item() == pytest.approx(2 - cosines, abs=1e-5)
    distance.backward()
    assert learner.keys.grad.abs().sum(dim=1).gt(1e-6).tolist() == [True, False, False, True]


def test_dualprompt_uses_the_own_expert_in_training_and_the_nearest_later() -> None:
    learner = DualPrompt(network(), QUICK)
    for _ in range(2):
        learner._begin()
    with torch.no_grad():
        for key, value in zip(learner.keys, (1.0, -1.0), strict=True):
            key.fill_(value)
    images, queries = torch.randn(1, 3, 16, 16), torch.ones(1, 32)
    training, far = learner._prompted(images, queries, training=True)
    asked, near = learner._prompted(images, queries, training=False)
    assert (far.item(), near.item()) == pytest.approx((2.0, 0.0), abs=1e-6)
    assert not torch.allclose(training, asked)
    with torch.no_grad():
        learner.keys[1].fill_(3.0)
        learner.keys[0].fill_(-3.0)
    torch.testing.assert_close(learner._prompted(images, queries, training=False)[0], training)


@pytest.mark.parametrize("make", MAKERS)
def test_learns_two_tasks_and_leaves_the_network_alone(make: type[PromptLearner]) -> None:
    vit = network()
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    learner = make(vit, QUICK)
    images, labels = task(1)
    learner.train(images, labels, 2)
    assert float((learner.scores(images).argmax(dim=1) == labels).float().mean()) >= 0.9
    first_head = learner.heads[0].weight.clone()
    more, their_labels = task(2, classes=3)
    learner.train(more, their_labels, 3)
    scores = learner.scores(torch.cat([images, more]))
    assert scores.shape == (64, 5)
    within = (scores[32:, 2:].argmax(dim=1) == their_labels).float().mean()
    assert float(within) >= 0.9
    assert torch.equal(learner.heads[0].weight, first_head)
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())


def test_an_earlier_expert_does_not_change() -> None:
    learner = DualPrompt(network(), QUICK)
    learner.train(*task(1), 2)
    kept = [one.detach().clone() for one in (learner.experts[0], learner.keys[0])]
    one_task = learner.kept_bytes()
    learner.train(*task(2), 2)
    assert torch.equal(learner.experts[0], kept[0])
    assert torch.equal(learner.keys[0], kept[1])
    assert one_task == 4 * (2 * 5 * 32 + 2 * 4 * 32 + 32)  # general, expert, key
    assert learner.kept_bytes() == one_task + 4 * (2 * 4 * 32 + 32)


@pytest.mark.parametrize("make", MAKERS)
def test_the_same_seed_learns_the_same(make: type[PromptLearner]) -> None:
    found = []
    for _ in range(2):
        learner = make(network(), QUICK)
        learner.train(*task(3), 2)
        found.append(learner.scores(task(4)[0]))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("make", "changed", "message"),
    [
        (L2P, {"chosen": 9}, "chosen prompts: expected 1 to 4, got 9"),
        (L2P, {"chosen": 0}, "chosen prompts"),
        (DualPrompt, {"expert_blocks": (1, 2)}, "prompted blocks: expected 0 to 1"),
        (DualPrompt, {"expert_blocks": (0, 1)}, "the general or the expert prompt, not both"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    make: type[PromptLearner], changed: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(network(), PromptSettings(**{**vars(QUICK), **changed}))


def test_a_network_without_class_token_is_refused() -> None:
    vit = timm.create_model(MODEL, num_classes=0, class_token=False, global_pool="avg", **MODEL_ARGS)
    with pytest.raises(ValueError, match="class token"):
        L2P(vit, QUICK)
