"""L2P and DualPrompt on a tiny transformer: the prompts' arithmetic, what is trained, and that it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import tiny_vit
import torch
from conftest import MODEL, MODEL_ARGS
from safetensors.torch import save_file
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn
from treelora_backends.vit.backend import VitBase
from treelora_backends.vit.contenders.heads import PromptContender, make_contender
from treelora_backends.vit.contenders.plain import PlainSession
from treelora_backends.vit.contenders.prompts import (
    L2P,
    DualPrompt,
    DualPromptSettings,
    L2PSettings,
    PromptedVit,
    PromptSession,
    prefixed_block,
)
from treelora_backends.vit.images import ImageTask, Pictures

from treelora_cli.backend import adapters
from treelora_cli.compare.worker import Contest
from treelora_cli.config import Config
from treelora_cli.errors import ModelError
from treelora_cli.methods.catalogue import load_method

POOL = L2PSettings(pool=4, chosen=2, length=3)
PAIR = DualPromptSettings(general_blocks=(0,), expert_length=4, expert_blocks=(1,))
METHODS = ["l2p", "dualprompt"]


def network() -> nn.Module:
    """Random weights, in attention larger than at initialisation, so that tokens take note of one another."""
    torch.manual_seed(0)
    vit = timm.create_model(MODEL, num_classes=0, **MODEL_ARGS)
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.weight.mul_(8)
            block.attn.proj.weight.mul_(8)
    return vit


@pytest.fixture(scope="module")
def strong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of ``network``."""
    path = tmp_path_factory.mktemp("strong") / "strong.safetensors"
    save_file(network().state_dict(), path)
    return path


def load(weights: Path, **train: Any) -> tuple[VitBase, Config]:
    return tiny_vit.load_vit(weights, **{"epochs": 20, "batch_size": 16, "lr": 0.02, **train})


def prompts_of(base: VitBase, method: str, seed: int = 0) -> PromptedVit:
    vit = base.trunk.vit
    return L2P(vit, POOL, seed) if method == "l2p" else DualPrompt(vit, PAIR, seed)


def contest_of(base: VitBase, config: Config, method: str) -> tuple[Contest, PromptContender]:
    model = PromptContender(base, prompts_of(base, method))
    return Contest(base, model, load_method(method).make(), config, 2, base.runtime), model


def task(seed: int, classes: int = 2, count: int = 32) -> ImageTask:
    """Noisy images around one random image a class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 3, 16, 16, generator=generator)
    labels = torch.arange(count) % classes
    images = centres[labels] + 0.3 * torch.randn(count, 3, 16, 16, generator=generator)
    pictures = Pictures(((images * 0.25 + 0.5) * 255).clamp(0, 255).byte(), labels)
    return ImageTask(tuple(f"{seed}-{one}" for one in range(classes)), pictures, pictures, "", (), "")


def images_of(base: VitBase, *tasks: ImageTask) -> Tensor:
    return base.preprocessing.normalise(torch.cat([one.train.pixels for one in tasks]))


# -- the prompts -----------------------------------------------------------------------------------


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
    learner = L2P(network().eval(), POOL, 0)
    queries = torch.zeros(1, 32)
    queries[0, 0] = 1.0
    with torch.no_grad():
        learner.keys.zero_()
        learner.keys[:, 0] = torch.tensor([1.0, -1.0, 0.0, 2.0])
        learner.keys[:, 1] = torch.tensor([1.0, 0.0, 1.0, 0.1])  # cosines 0.71, -1, 0, nearly 1
    _, distance = learner.prompted(torch.zeros(1, 3, 16, 16), queries, training=True)
    cosines = 2**-0.5 + 2 / (4 + 0.01) ** 0.5
    assert distance.item() == pytest.approx(2 - cosines, abs=1e-5)
    distance.backward()
    assert learner.keys.grad.abs().sum(dim=1).gt(1e-6).tolist() == [True, False, False, True]


def test_dualprompt_uses_the_own_expert_in_training_and_the_nearest_later() -> None:
    learner = DualPrompt(network().eval(), PAIR, 0)
    for _ in range(2):
        learner.begin()
    with torch.no_grad():
        for key, value in zip(learner.keys, (1.0, -1.0), strict=True):
            key.fill_(value)
    images, queries = torch.randn(1, 3, 16, 16), torch.ones(1, 32)
    training, far = learner.prompted(images, queries, training=True)
    asked, near = learner.prompted(images, queries, training=False)
    assert (far.item(), near.item()) == pytest.approx((2.0, 0.0), abs=1e-6)
    assert not torch.allclose(training, asked)
    with torch.no_grad():
        learner.keys[1].fill_(3.0)
        learner.keys[0].fill_(-3.0)
    torch.testing.assert_close(learner.prompted(images, queries, training=False)[0], training)


@pytest.mark.parametrize(
    ("depth", "general", "experts"),
    [(1, (), (0,)), (2, (0,), (1,)), (4, (0, 1), (2, 3)), (6, (0, 1), (2, 3, 4)), (12, (0, 1), (2, 3, 4))],
)
def test_the_blocks_of_dualprompt_fit_every_depth(
    depth: int, general: tuple[int, ...], experts: tuple[int, ...]
) -> None:
    settings = DualPromptSettings.of_depth(depth)
    assert (settings.general_blocks, settings.expert_blocks) == (general, experts)
    vit = timm.create_model(MODEL, num_classes=0, **{**MODEL_ARGS, "depth": depth}).eval()
    learner = DualPrompt(vit, settings, 0)
    learner.begin()
    assert learner.experts[0].shape == (len(experts), 2, 20, 32)
    features, distance = learner.prompted(torch.zeros(2, 3, 16, 16), torch.ones(2, 32), training=True)
    (features.square().sum() + distance).backward()
    assert all(one.grad.abs().sum(dim=(1, 2, 3)).gt(0).all() for one in learner.trained()[:2] if one.numel())


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (L2P, L2PSettings(pool=4, chosen=9), "chosen prompts: expected 1 to 4, got 9"),
        (L2P, L2PSettings(pool=4, chosen=0), "chosen prompts"),
        (DualPrompt, DualPromptSettings(expert_blocks=(1, 2)), "prompted blocks: expected 0 to 1"),
        (
            DualPrompt,
            DualPromptSettings(general_blocks=(0,), expert_blocks=(0, 1)),
            "the general or the expert prompt, not both",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(make: Any, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(network(), settings, 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"class_token": False, "global_pool": "avg"}, "class token"),
        ({"block_fn": ResPostBlock}, r"do not fit this model's blocks \(ResPostBlock, Attention\)"),
    ],
)
def test_an_architecture_that_takes_no_prompts_is_refused(changed: dict[str, Any], message: str) -> None:
    vit = timm.create_model(MODEL, num_classes=0, **changed, **MODEL_ARGS)
    with pytest.raises(ModelError, match=message):
        L2P(vit, POOL, 0)


# -- a task ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_learns_two_tasks_and_leaves_the_network_and_the_slot_alone(strong: Path, method: str) -> None:
    base, config = load(strong)
    contest, model = contest_of(base, config, method)
    first, more = task(1), task(2, classes=3)
    contest._train([first], config)
    right = model.scores(images_of(base, first)).argmax(dim=1) == first.train.labels
    assert float(right.float().mean()) >= 0.9
    head = model.linear.head.weight.clone()
    before = {name: value.clone() for name, value in base.network.state_dict().items()}
    report = contest._train([more], config)
    scores = model.scores(images_of(base, first, more))
    assert scores.shape == (64, 5)
    within = (scores[32:, 2:].argmax(dim=1) == more.train.labels).float().mean()
    assert float(within) >= 0.9
    assert torch.equal(model.linear.head.weight[:2], head)
    assert all(torch.equal(value, before[name]) for name, value in base.network.state_dict().items())
    assert not any(up.any() for _, up in adapters.slot_parameters(base.network, base.layers))
    prompts = 4 * 32 + 4 * 3 * 32 if method == "l2p" else 2 * 5 * 32 + 2 * 4 * 32 + 32
    assert report.trained_parameters == prompts + 3 * 33
    frozen = timm.create_model(MODEL, num_classes=0, **MODEL_ARGS).eval()
    frozen.load_state_dict(network().state_dict())
    with torch.no_grad(), adapters.base_only(base.network):
        images = images_of(base, first)
        torch.testing.assert_close(base.trunk.vit.forward_features(images), frozen.forward_features(images))


def test_an_earlier_expert_does_not_change(strong: Path) -> None:
    base, config = load(strong, epochs=2)
    contest, model = contest_of(base, config, "dualprompt")
    prompts = model.prompts
    assert isinstance(prompts, DualPrompt)
    contest._train([task(1)], config)
    kept = [one.detach().clone() for one in (prompts.experts[0], prompts.keys[0])]
    general = prompts.general.detach().clone()
    one_task = prompts.kept_bytes()
    assert model.kept_bytes() == one_task + 4 * 2 * 33
    contest._train([task(2)], config)
    assert torch.equal(prompts.experts[0], kept[0])
    assert torch.equal(prompts.keys[0], kept[1])
    assert not torch.equal(prompts.general, general)
    assert one_task == 4 * (2 * 5 * 32 + 2 * 4 * 32 + 32)  # general, expert, key
    assert prompts.kept_bytes() == one_task + 4 * (2 * 4 * 32 + 32)
    assert model.kept_bytes() == prompts.kept_bytes() + 4 * 4 * 33


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_learns_the_same(strong: Path, method: str) -> None:
    found = []
    for _ in range(2):
        base, config = load(strong, epochs=2)
        contest, model = contest_of(base, config, method)
        contest._train([task(3)], config)
        found.append(model.scores(images_of(base, task(4))))
    assert torch.equal(*found)


def opened(base: VitBase, config: Config, method: str) -> tuple[PromptSession, PlainSession, PromptContender]:
    """A prepared session on ``task(1)`` whose classifier is not zero, and one without prompts on the same."""
    model = PromptContender(base, prompts_of(base, method))
    session = model.session([task(1)], config)
    session.prepare()
    assert session.plain.layer is not None
    with torch.no_grad():
        session.plain.layer.weight.copy_(torch.randn(2, 32, generator=torch.Generator().manual_seed(0)))
    plain = PlainSession(base, [task(1)], config, 0, nn.Linear(32, 2), torch.tensor([0, 1]))
    return session, plain, model


@pytest.mark.parametrize("method", METHODS)
def test_each_view_is_asked_for_its_query_once(strong: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, config = load(strong, epochs=3)
    contest, model = contest_of(base, config, method)
    sizes: list[int] = []
    query = model.prompts.query
    monkeypatch.setattr(model.prompts, "query", lambda images: sizes.append(len(images)) or query(images))
    report = contest._train([task(1)], config)
    assert report.steps == 6 and sum(sizes) == 2 * 32
    session, _, _ = opened(base, config, method)
    images = images_of(base, task(1))
    with torch.no_grad(), adapters.base_only(base.network):
        wanted = [base.trunk.vit.forward_features(view)[:, 0] for view in (images, images.flip(-1))]
    torch.testing.assert_close(session.queries, torch.stack(wanted, dim=1))


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_is_the_misfit_and_the_key_term_of_the_views_drawn(strong: Path, method: str) -> None:
    base, config = load(strong)
    session, plain, model = opened(base, config, method)
    assert session.steps_per_epoch == plain.steps_per_epoch == 2
    for mine, theirs in zip(session.batches(1), plain.batches(1), strict=True):
        assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])
    layer = session.plain.layer
    assert layer is not None
    rows, views = torch.tensor([5, 2, 0]), torch.tensor([1, 0, 1])
    images = images_of(base, task(1))[rows]
    images = torch.stack([images[0].flip(-1), images[1], images[2].flip(-1)])
    with adapters.base_only(base.network):
        features, distance = model.prompts.prompted(images, model.prompts.query(images), training=True)
    fit = nn.functional.cross_entropy(layer(features), task(1).train.labels[rows])
    pull = 0.5 if method == "l2p" else 1.0
    torch.testing.assert_close(session.loss((rows, views)), fit + pull * distance)
    probes = [one.item() for one in session.probe_losses(9)]
    assert len(probes) == 2 and probes == [one.item() for one in session.probe_losses(2)]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_in_the_slot_does_not_act(strong: Path, method: str) -> None:
    base, config = load(strong)
    session, _, model = opened(base, config, method)
    images, batch = images_of(base, task(2)), (torch.arange(4), torch.zeros(4, dtype=torch.int64))
    model.learned()
    before = model.scores(images), session.loss(batch)
    assert bool(before[0].abs().sum() > 0)
    with torch.no_grad():
        for _, up in adapters.slot_parameters(base.network, base.layers):
            up.normal_()
    assert torch.equal(model.scores(images), before[0]) and torch.equal(session.loss(batch), before[1])
    session.loss(batch).backward()
    assert all(p.grad is None for pair in adapters.slot_parameters(base.network, base.layers) for p in pair)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_changes_little_and_not_the_choice(strong: Path, method: str) -> None:
    base, config = load(strong, precision="auto")
    session, _, _ = opened(base, config, method)
    batch = (torch.arange(8), torch.zeros(8, dtype=torch.int64))
    full, queries = session.loss(batch), session.queries.clone()
    base.runtime.precision = "bf16"
    half = session.loss(batch)
    assert half.dtype == torch.float32 and half.item() != full.item()
    torch.testing.assert_close(half, full, rtol=0.02, atol=0.02)
    session.prepare()
    assert session.queries.dtype == torch.float32
    torch.testing.assert_close(session.queries, queries, rtol=0.05, atol=0.05)
    contest, _ = contest_of(base, config, method)
    contest._train([task(1)], config)
    assert base.runtime.precision in ("fp32", "bf16")


@pytest.mark.parametrize("method", METHODS)
def test_the_backend_makes_it_with_the_papers_sizes(weights: Path, method: str) -> None:
    base, config = load(weights)
    model = make_contender(base, method, config)
    assert isinstance(model, PromptContender)
    model.session([task(1)], config)
    pool, pair = 10 * 32 + 10 * 5 * 32, 1 * 2 * 5 * 32 + 1 * 2 * 20 * 32 + 32
    assert model.prompts.kept_bytes() == 4 * (pool if method == "l2p" else pair)
