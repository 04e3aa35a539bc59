"""How contenders learn and answer on images: every head against numbers worked out by hand or in closed form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_vit
import torch
from conftest import STREAM
from torch import Tensor
from treelora_backends.vit.backend import VitBase
from treelora_backends.vit.contenders.heads import AlignedContender, LinearContender, MeanContender, RidgeContender
from treelora_backends.vit.contenders.heads import RoutedContender as Routed
from treelora_backends.vit.contenders.plain import ClassTable, PlainSession, features_of
from treelora_backends.vit.session import VitSession

from treelora_cli.backend import adapters
from treelora_cli.backend.contract import ContenderModel
from treelora_cli.backend.values import DataRequest, Memory
from treelora_cli.compare.worker import Contest
from treelora_cli.config import Config, TrainConfig, resolve
from treelora_cli.heads.ridge import LinearHead
from treelora_cli.learning.stream import PlannedTask
from treelora_cli.methods.catalogue import load_method

WIDTH = 48
"""Random features in these tests."""


def load_vit(weights: Path, **train: Any) -> tuple[VitBase, Config]:
    return tiny_vit.load_vit(weights, **{"epochs": 2, "batch_size": 8, "lr": 0.01, **train})


def planned(data: Path, *names: str) -> list[PlannedTask]:
    return [PlannedTask(name, DataRequest(path=data / name), None) for name in names]


def contest_of(base: Any, model: ContenderModel, method: str, config: Config) -> Contest:
    return Contest(base, model, load_method(method).make(), config, len(STREAM), base.runtime)


NAMES = [name for name, _ in STREAM]


def features_by_class(base: VitBase, data: Path, name: str) -> dict[str, Tensor]:
    """Pooled features of a task's training images by class, by the network as it is."""
    task = base.read_task(DataRequest(path=data / name))
    with torch.no_grad():
        features = features_of(base, base.preprocessing.normalise(task.train.pixels))
    return {label: features[task.train.labels == index] for index, label in enumerate(task.labels)}


def test_the_plain_session_sees_the_data_in_the_order_of_ours(weights: Path, data: Path) -> None:
    base, config = load_vit(weights)
    config = replace(config, head=replace(config.head, views=2))
    task = base.read_task(DataRequest(path=data / "warm"))
    table = ClassTable()
    table.add([task])
    plain = PlainSession(base, [task], config, 0, torch.nn.Linear(32, 2), table.rows([task]))
    ours = VitSession(base, task, Memory((), dict), config)
    ours.prepare()
    assert plain.steps_per_epoch == ours.steps_per_epoch == 2
    for epoch in (0, 1):
        for mine, theirs in zip(plain.batches(epoch), ours.batches(epoch), strict=True):
            assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


def test_a_class_in_another_spelling_is_the_same_class(weights: Path, data: Path) -> None:
    base, _ = load_vit(weights)
    task = base.read_task(DataRequest(path=data / "warm"))
    table = ClassTable()
    table.add([task])
    table.add([replace(task, labels=tuple(label.upper() for label in task.labels))])
    assert len(table.names) == 2 and table.first_task == [0, 0]
    again = replace(task, labels=("RED", "green"))
    assert table.truth(again).tolist() == [table.names.index("red"), -1]


def test_a_mirrored_view_is_the_flipped_image(weights: Path, data: Path) -> None:
    base, config = load_vit(weights)
    task = base.read_task(DataRequest(path=data / "warm"))
    layer = torch.nn.Linear(32, 2)
    session = PlainSession(base, [task], config, 0, layer, torch.tensor([0, 1]))
    rows, views = torch.tensor([0, 3]), torch.tensor([0, 1])
    images = base.preprocessing.normalise(task.train.pixels[rows])
    seen = torch.stack([images[0], images[1].flip(-1)])
    wanted = torch.nn.functional.cross_entropy(layer(features_of(base, seen)), task.train.labels[rows])
    torch.testing.assert_close(session.loss((rows, views)), wanted)


def test_older_rows_of_the_linear_head_stay_bit_for_bit(weights: Path, data: Path) -> None:
    base, config = load_vit(weights)
    model = LinearContender(base)
    contest = contest_of(base, model, "seqlora", config)
    contest.learn(planned(data, "warm"), config)
    before = adapters.read_slot(base.network, base.layers, base.scale)
    rows, bias = model.head.weight.clone(), model.head.bias.clone()
    contest.learn(planned(data, "cold"), config)
    after = adapters.read_slot(base.network, base.layers, base.scale)
    assert torch.equal(model.head.weight[:2], rows) and torch.equal(model.head.bias[:2], bias)
    assert model.head.weight.shape == (5, 32) and bool(model.head.weight[2:].abs().sum(dim=1).gt(0).all())
    assert not torch.equal(before.up[0], after.up[0])
    per_layer = sum(a.numel() + b.numel() for a, b in adapters.slot_parameters(base.network, base.layers))
    assert contest.trained_parameters == per_layer + 3 * 33
    assert model.kept_bytes() == 4 * (per_layer + 5 * 33)
    assert contest.steps == 2 * 2 + 2 * 3
    assert [len(row) for row in contest.matrix.rows] == [1, 2]


def test_a_class_that_comes_back_is_trained_on(weights: Path, data: Path) -> None:
    base, config = load_vit(weights)
    model = LinearContender(base)
    contest = contest_of(base, model, "seqlora", config)
    contest.learn(planned(data, "warm"), config)
    learned = model.head.weight.clone()
    again = PlannedTask("again", DataRequest(path=data / "warm", classes=("red", "yellow")), 0)
    contest.learn([again], resolve(Config(train=TrainConfig(epochs=0)), Config(), config))
    assert torch.equal(model.head.weight, learned)  # no new rows, and without an epoch nothing moves
    contest.learn(planned(data, "warm"), config)
    assert model.head.weight.shape == learned.shape and not torch.equal(model.head.weight, learned)


def test_joint_learns_all_classes_at_once_and_has_one_complete_row(weights: Path, data: Path) -> None:
    base, config = load_vit(weights)
    model = LinearContender(base)
    contest = contest_of(base, model, "joint", config)
    contest.learn(planned(data, *NAMES), config)
    assert contest.matrix.rows[:2] == ((None,), (None, None))
    assert None not in contest.matrix.rows[2] and contest.matrix.overall() is not None
    assert len(model.head.bias) == 7 and contest.steps == 2 * 7  # 56 images, 8 at a time


def test_the_mean_head_answers_by_the_cosine_to_class_means(weights: Path, data: Path) -> None:
    base, config = load_vit(weights)
    model = MeanContender(base)
    contest = contest_of(base, model, "ncm", config)
    for name in NAMES:
        contest.learn(planned(data, name), config)
    with adapters.base_only(base.network):
        by_class = {k: v for name in NAMES for k, v in features_by_class(base, data, name).items()}
        test = base.read_task(DataRequest(path=data / "cold", test_only=True)).test
        images = base.preprocessing.normalise(test.pixels)
        with torch.no_grad():
            held = features_of(base, images)
    assert list(by_class) == model.table.names
    means = torch.stack([one.mean(dim=0) for one in by_class.values()])
    torch.testing.assert_close(model.means, means)
    cosine = torch.nn.functional.cosine_similarity(held[:, None], means[None], dim=2)
    wanted = (cosine.argmax(dim=1) == test.labels + 2).float().mean()
    assert contest.matrix.rows[2][1] == pytest.approx(float(wanted))
    assert contest.trained_parameters == contest.steps == 0


def test_ridge_adapts_in_the_first_session_only(weights: Path, data: Path) -> None:
    base, config = load_vit(weights)
    model = RidgeContender(base, WIDTH, 0)
    contest = contest_of(base, model, "ranpac", config)
    contest.learn(planned(data, "warm"), config)
    adapted = adapters.read_slot(base.network, base.layers, base.scale)
    assert contest.steps == 4 and bool(adapted.up[0].abs().sum() > 0)
    contest.learn(planned(data, "cold"), config)
    assert contest.steps == 4
    assert torch.equal(adapters.read_slot(base.network, base.layers, base.scale).up[0], adapted.up[0])
    by_class = features_by_class(base, data, "warm") | features_by_class(base, data, "cold")
    expanded = torch.relu(torch.cat(list(by_class.values())) @ model.ridge.projection)
    torch.testing.assert_close(model.ridge.gram, expanded.T @ expanded, rtol=1e-4, atol=1e-2)
    sums = torch.stack([torch.relu(one @ model.ridge.projection).sum(dim=0) for one in by_class.values()])
    torch.testing.assert_close(model.ridge.sums, sums, rtol=1e-4, atol=1e-3)


def test_aligned_keeps_the_adapted_networks_class_statistics(weights: Path, data: Path) -> None:
    base, config = load_vit(weights, lr=0.001)
    model = AlignedContender(base)
    contest = contest_of(base, model, "slca", config)
    contest.learn(planned(data, "warm"), config)
    warm = features_by_class(base, data, "warm")
    contest.learn(planned(data, "cold"), config)
    cold = features_by_class(base, data, "cold")
    for one, features in enumerate([*warm.values(), *cold.values()]):
        torch.testing.assert_close(model.gaussians[one].mean, features.mean(dim=0), rtol=1e-4, atol=1e-5)
        root, covariance = model.gaussians[one].root, torch.cov(features.T)
        jitter = 1e-4 * max(1.0, float(covariance.diagonal().mean())) * torch.eye(32)
        torch.testing.assert_close(root @ root.T, covariance + jitter, rtol=1e-3, atol=1e-4)
    assert model.aligned.weight.shape == model.linear.head.weight.shape == (5, 32)
    assert not torch.equal(model.aligned.weight, model.linear.head.weight)


def test_the_aligned_head_learns_ten_times_as_fast_as_the_adapter(weights: Path, data: Path) -> None:
    base, config = load_vit(weights, lr=0.001, epochs=1, batch_size=16)
    model = AlignedContender(base)
    contest_of(base, model, "slca", config).learn(planned(data, "warm"), config)
    moved = model.linear.head.weight.abs().median()  # one step of Adam moves every number by its rate
    torch.testing.assert_close(moved, torch.tensor(0.01), rtol=1e-3, atol=0)


def test_routed_keeps_an_adapter_and_two_gaussians_for_each_class(weights: Path, data: Path) -> None:
    base, config = load_vit(weights)
    model = Routed(base)
    contest = contest_of(base, model, "hidelora", config)
    contest.learn(planned(data, "warm"), config)
    contest.learn(planned(data, "cold"), config)
    assert len(model.adapters) == 2 and model.column_task == [0, 0, 1, 1, 1] and model.column_class == [0, 1, 2, 3, 4]
    for task, (name, first) in enumerate((("warm", 0), ("cold", 2))):
        adapters.write_slot(base.network, model.adapters[task])
        with adapters.base_only(base.network):
            bare = features_by_class(base, data, name)
        for offset, (label, features) in enumerate(features_by_class(base, data, name).items()):
            torch.testing.assert_close(model.adapted[first + offset].mean, features.mean(dim=0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model.bare[first + offset].mean, bare[label].mean(dim=0), rtol=1e-4, atol=1e-5)
    sizes = 4 * sum(a.numel() + b.numel() for a, b in adapters.slot_parameters(base.network, base.layers))
    heads, gaussians = 4 * 3 * (5 * 33), 4 * 10 * (32 + 32 * 32)
    assert model.kept_bytes() == 2 * sizes + heads + gaussians


def test_routed_answers_through_the_adapter_of_the_inferred_task(weights: Path, data: Path) -> None:
    base, config = load_vit(weights)
    model = Routed(base)
    contest = contest_of(base, model, "hidelora", config)
    contest.learn(planned(data, "warm"), config)
    contest.learn(planned(data, "cold"), config)
    task = base.read_task(DataRequest(path=data / "warm", test_only=True))
    images = base.preprocessing.normalise(task.test.pixels)
    for chosen in (0, 1):
        bias = torch.where(torch.tensor(model.column_task) == chosen, 0.0, -1e9)
        model.identity = LinearHead(torch.zeros(5, 32), bias)
        answers = model._answer(images)
        adapters.write_slot(base.network, model.adapters[chosen])
        with torch.no_grad():
            assert torch.equal(answers, model.prediction(features_of(base, images)).argmax(dim=1))


@pytest.mark.parametrize("method", ["seqlora", "olora", "ewc", "inflora", "gem", "ogd"])
def test_every_shared_adapter_learns_the_stream_under_the_linear_head(weights: Path, data: Path, method: str) -> None:
    base, config = load_vit(weights)
    contest = contest_of(base, LinearContender(base), method, config)
    for name in NAMES:
        contest.learn(planned(data, name), config)
    assert [len(row) for row in contest.matrix.rows] == [1, 2, 3] and contest.matrix.overall() is not None
    assert contest.steps == 2 * (2 + 3 + 2)
    assert contest.strategy.kept_bytes() > 0 or method == "seqlora"


@pytest.mark.parametrize("method", ["l2p", "dualprompt"])
def test_prompts_learn_the_stream_without_an_adapter(weights: Path, data: Path, method: str) -> None:
    base, config = load_vit(weights)
    model = base.contender(method, config)
    contest = contest_of(base, model, method, config)
    for name in NAMES:
        contest.learn(planned(data, name), config)
    assert [len(row) for row in contest.matrix.rows] == [1, 2, 3] and contest.matrix.overall() is not None
    assert contest.steps == 2 * (2 + 3 + 2)
    pool, general, expert = 10 * 32 + 10 * 5 * 32, 2 * 5 * 32, 2 * 20 * 32 + 32
    trained = pool if method == "l2p" else general + expert
    assert contest.trained_parameters == trained + 3 * 33
    kept = pool if method == "l2p" else general + 3 * expert
    assert model.kept_bytes() == 4 * (kept + 7 * 33) and contest.strategy.kept_bytes() == 0
