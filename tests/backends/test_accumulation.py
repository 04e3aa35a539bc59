"""Accumulated batches: the gradient of the larger batch, for images and for texts, in projects and for contenders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_vit_prompts import images_of, load, task
from tiny_lm import assert_same, gradients, opened, tiny_models
from torch import Tensor, nn
from treelora_backends.causal_lm.contenders import PlainLmSession
from treelora_backends.causal_lm.network.ahead import mean_cross_entropy
from treelora_backends.vit.augment import Augment
from treelora_backends.vit.contenders.plain import PlainSession
from treelora_backends.vit.images import ImageTask
from treelora_backends.vit.session import VitSession

from treelora_cli.backend import adapters
from treelora_cli.backend.values import DataRequest, Memory
from treelora_cli.errors import UsageError

BATCH = torch.arange(13), torch.tensor([0, 1] * 6 + [0])
HOW = {"label_smoothing": 0.1, "class_weights": "balanced"}


def unbalanced() -> ImageTask:
    """Thirteen images of one class and five of another."""
    both = task(5, count=26)
    keep = torch.cat([(both.train.labels == 0).nonzero()[:, 0], (both.train.labels == 1).nonzero()[:5, 0]])
    pictures = replace(both.train, pixels=both.train.pixels[keep], labels=both.train.labels[keep])
    return replace(both, train=pictures, test=pictures)


def of_project(base: Any, config: Any) -> Any:
    session = base.session(unbalanced(), Memory((), dict), config)
    adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, 2.0, 0))
    session.prepare()
    return session


def of_contender(base: Any, config: Any) -> Any:
    adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, 2.0, 0))
    return PlainSession(base, [unbalanced()], config, 0, nn.Linear(32, 2), torch.tensor([0, 1]))


def with_a_classifier(weights: Path, opened_as: Any, **train: Any) -> tuple[Any, list[Tensor]]:
    """Return a session of two views whose classifier has drawn weights, and all that it trains."""
    base, config = load(weights, **train)
    config = replace(config, head=replace(config.head, views=2))
    session = opened_as(base, config)
    layer = session.layer if opened_as is of_contender else session.head
    with torch.no_grad():
        layer.weight.copy_(torch.randn(2, 32, generator=torch.Generator().manual_seed(1)))
        layer.bias.zero_()
    trained = [part for pair in adapters.slot_parameters(base.network, base.layers) for part in pair]
    return session, [*trained, *session.parameters()]


def image_gradients(weights: Path, opened_as: Any, parts: int) -> tuple[Any, list[Tensor]]:
    session, trained = with_a_classifier(weights, opened_as, batch_size=12 // parts, accumulate=parts, **HOW)
    return session, list(torch.autograd.grad(session.loss(BATCH), trained))


@pytest.mark.parametrize("opened_as", [of_project, of_contender])
def test_images_in_parts_have_the_gradient_of_the_larger_batch(weights: Path, opened_as: Any) -> None:
    one, whole = image_gradients(weights, opened_as, 1)
    other, parts = image_gradients(weights, opened_as, 3)
    assert one.steps_per_epoch == other.steps_per_epoch == 2, "eighteen images, twelve a step"
    assert any(bool(gradient.abs().max() > 1e-3) for gradient in whole)
    assert_same(parts, whole)


def test_who_opens_a_branch_holds_few_images_at_once_with_the_same_gradient(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    taken = VitSession._loss_of_part

    def noted(session: VitSession, rows: Tensor, views: Tensor) -> Tensor:
        sizes.append(len(rows))
        return taken(session, rows, views)

    def opening(base: Any, config: Any) -> Any:
        session = of_project(base, replace(config, tree=replace(config.tree, branch="auto")))
        session.open_branch("first", ask=False)
        return session

    monkeypatch.setattr(VitSession, "_loss_of_part", noted)
    found = {}
    for most in (16, 4):
        monkeypatch.setattr("treelora_backends.vit.session._FEW_TRAINED", most)
        _, found[most] = image_gradients(weights, opening, 1)
    assert sizes == [13, 4, 3, 3, 3]
    assert any(bool(gradient.abs().max() > 1e-3) for gradient in found[16])
    assert_same(found[4], found[16])


@pytest.mark.parametrize(("branch", "images"), [("never", 12), ("auto", 4)])
def test_arithmetic_is_measured_on_as_many_images_as_a_step_holds(
    weights: Path, monkeypatch: pytest.MonkeyPatch, branch: str, images: int
) -> None:
    monkeypatch.setattr("treelora_backends.vit.session._FEW_TRAINED", 4)
    base, config = load(weights, batch_size=12)
    session = of_project(base, replace(config, tree=replace(config.tree, branch=branch)))
    sizes: list[int] = []
    pooled = base.trunk.pooled
    monkeypatch.setattr(base.trunk, "pooled", lambda tokens: sizes.append(len(tokens)) or pooled(tokens))
    session.try_step([part for pair in adapters.slot_parameters(base.network, base.layers) for part in pair])
    assert max(sizes) == images  # others are of one image, by which the network is known


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tiny_models(tmp_path_factory.mktemp("parts"))["llama"]
    return found


def texts(folder: Path) -> DataRequest:
    answers = ["red"] * 9 + ["green and blue"] * 3
    rows = [{"sentence": "word " * (3 + place), "label": answer} for place, answer in enumerate(answers)]
    for part in ("train", "test"):
        (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return DataRequest(folder)


def text_gradients(model: Path, request: DataRequest, parts: int, kind: str) -> tuple[Any, Any]:
    base = opened(model)
    config = replace(base.config, train=replace(base.config.train, batch_size=6 // parts, accumulate=parts, **HOW))
    found = base.read_task(request)
    plain = kind == "contender"
    session = PlainLmSession(base, [found], config, 0) if plain else base.session(found, Memory((), dict), config)
    session.prepare()
    base.network.train()
    return session, gradients(base, session.loss([0, 3, 5, 8, 10, 11]))


@pytest.mark.parametrize("kind", ["project", "contender"])
def test_texts_in_parts_have_the_gradient_of_the_larger_batch(model: Path, tmp_path: Path, kind: str) -> None:
    request = texts(tmp_path)
    one, whole = text_gradients(model, request, 1, kind)
    other, parts = text_gradients(model, request, 3, kind)
    assert one.steps_per_epoch == other.steps_per_epoch == 2
    assert one.objective.weights.tolist() == pytest.approx([12 / (2 * 3), 12 / (2 * 9)]), "in the labels' order"
    assert_same(parts, whole)


def test_probes_measure_neither_smoothing_nor_weights(model: Path, tmp_path: Path) -> None:
    base, request = opened(model), texts(tmp_path)
    changed = replace(base.config, train=replace(base.config.train, **HOW))
    losses = []
    for config in (base.config, changed):
        session = base.session(base.read_task(request), Memory((), dict), config)
        session.prepare()
        losses.append([one.item() for one in session.probe_losses(2)])
    assert losses[0] == losses[1]


def test_free_answers_have_no_classes_to_weigh(model: Path, tmp_path: Path) -> None:
    base = opened(model)
    (tmp_path / "free.jsonl").write_text('{"prompt": "a", "answer": "b c"}\n{"prompt": "d", "answer": "e f"}\n')
    task_read = base.read_task(DataRequest(tmp_path / "free.jsonl"))
    config = replace(base.config, train=replace(base.config.train, class_weights="balanced"))
    with pytest.raises(UsageError, match=r"^train\.class_weights balanced: the answers are free text, so there are no"):
        base.session(task_read, Memory((), dict), config)


@pytest.mark.parametrize("at_once", [2, 100])
def test_a_smoothed_weighted_loss_of_tokens_is_the_plain_formula(at_once: int) -> None:
    torch.manual_seed(0)
    head, targets, weights = nn.Linear(8, 20).requires_grad_(False), torch.randint(20, (5,)), torch.rand(5)
    states = torch.randn(5, 8, requires_grad=True)
    losses = nn.functional.cross_entropy(head(states), targets, reduction="none", label_smoothing=0.2)
    wanted = (losses * weights).sum() / 5
    found = mean_cross_entropy(states, targets, head, at_once, 0.2, weights)
    torch.testing.assert_close(found, wanted)
    assert_same(torch.autograd.grad(found, states), torch.autograd.grad(wanted, states))


def test_images_are_changed_by_torchs_generator_alone() -> None:
    pixels = task(1, count=4).train.pixels
    change = Augment("rand-m9-mstd0.5", (16, 16), (0.5, 0.5, 0.5))
    torch.manual_seed(3)
    first = change(pixels)
    second = change(pixels)
    torch.manual_seed(3)
    assert torch.equal(change(pixels), first) and not torch.equal(first, second)
    assert first.shape == pixels.shape and first.dtype == torch.uint8
    assert not torch.equal(first, pixels)


def test_training_sees_other_images_and_statistics_do_not(weights: Path) -> None:
    base, config = load(weights, augment="rand-m9-n2-p1", batch_size=16)
    session = of_contender(base, config)
    rows, views = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    plain = images_of(base, unbalanced())[:4]
    assert torch.equal(session.images(rows, views), plain)
    assert not torch.equal(session.images(rows, views, session.augment), plain)
    own = of_project(base, config)
    entered = own.entering(rows, views)
    assert entered.shape == own._entering_anew(rows, views, own.augment).shape
    assert not torch.allclose(entered, own._entering_anew(rows, views, own.augment), atol=1e-2)


def test_balanced_classes_of_a_task_count_alike_in_the_solved_heads(weights: Path) -> None:
    base, config = load(weights, batch_size=16)
    plain = of_project(base, config).finish().tensors["anchor.counts"]
    config = replace(config, head=replace(config.head, class_weights="balanced"))
    assert plain.tolist() == [13.0, 5.0]
    torch.testing.assert_close(of_project(base, config).finish().tensors["anchor.counts"], torch.tensor([9.0, 9.0]))
