"""Rate, clipping and refusals of the loop's settings; all of them through an interruption, exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Cli, check_error, learned_hashes, make_images, plain_runtime
from interrupting import OPTIONS, stop_after
from test_trainer import Toy, trainer_of
from torch import nn
from treelora_backends.objective import Objective, class_weights

from treelora_cli.backend.registry import check_settings
from treelora_cli.config import Config, TrainConfig
from treelora_cli.errors import UsageError
from treelora_cli.learning.trainer import TrainSettings
from treelora_cli.project.state import seal, unseal

ALL = {
    "warmup": 0.25,
    "schedule": "linear",
    "accumulate": 2,
    "label_smoothing": 0.1,
    "clip": 0.5,
    "class_weights": "balanced",
    "augment": "rand-m9-mstd0.5",
}
SET = [part for key, value in ALL.items() for part in ("--set", f"train.{key}={value}")]


def rates(total: int, **settings: Any) -> list[float]:
    loop = TrainSettings(epochs=1, lr=1.0, weight_decay=0.0, batch_size=1, seed=0, **settings)
    return [loop.rate(step, total) for step in range(total)]


def test_the_rate_rises_from_above_zero_and_falls_as_asked() -> None:
    assert rates(4) == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    assert rates(4, schedule="linear") == [1.0, 0.75, 0.5, 0.25]
    assert rates(3, schedule="constant") == [1.0, 1.0, 1.0]
    assert rates(6, schedule="linear", warmup=1 / 3) == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25])
    assert rates(4, schedule="constant", warmup=0.75) == [0.25, 0.5, 0.75, 1.0]
    assert rates(3, warmup=1.0) == [0.25, 0.5, 0.75]


def test_gradients_are_clipped_together() -> None:
    toy = Toy(dropout=0.0)
    trainer = trainer_of(toy, clip=0.01)
    batch = torch.arange(4)
    grads = torch.autograd.grad(toy.loss(batch), [toy.down, toy.up, toy.bias])
    norm = torch.cat([one.flatten() for one in grads]).norm()
    assert float(norm) > 0.01
    trainer._take_step(batch)
    for parameter, grad in zip((toy.down, toy.up, toy.bias), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad * 0.01 / norm, rtol=1e-4, atol=1e-8)


def test_a_smoothed_weighted_loss_by_hand() -> None:
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, 0.0]]), torch.tensor([0, 0, 0, 1])
    weights = class_weights("balanced", labels, 2, plain_runtime())
    assert weights is not None and weights.tolist() == pytest.approx([4 / (2 * 3), 4 / (2 * 1)])
    assert float(weights[labels].mean()) == pytest.approx(1.0)
    logs = logits.log_softmax(1)
    smooth = -(0.9 * logs.gather(1, labels[:, None])[:, 0] + 0.1 * logs.mean(1))
    torch.testing.assert_close(Objective(0.1, weights)(logits, labels), (smooth * weights[labels]).mean())
    torch.testing.assert_close(Objective(0.1)(logits, labels), smooth.mean())
    assert torch.equal(Objective()(logits, labels), nn.functional.cross_entropy(logits, labels))
    assert class_weights("none", labels, 2, plain_runtime()) is None


def test_all_of_them_through_an_interruption_and_in_the_record(cli: Cli, project: Path, tmp_path: Path) -> None:
    more = make_images(tmp_path / "more", ["pink", "brown"], train=16)
    whole = Path(shutil.copytree(project, tmp_path / "whole"))
    done = cli("-C", whole, "train-task", more, *OPTIONS, *SET, "--json")
    assert done.code == 0, done.err
    assert done.json["steps"] == 8, "four epochs of 32 images, 16 a step"
    stop_after(cli, project, more, 3, *SET)
    resumed = cli("-C", project, "train-task", "--resume", "--device", "cpu", "--json")
    assert resumed.code == 0, resumed.err
    assert learned_hashes(project) == learned_hashes(whole)
    record = json.loads(next(whole.glob("tasks/*-more/task.json")).read_text())
    assert {key: record["settings"]["train"][key] for key in ALL} == ALL


def test_a_checkpoint_from_before_a_setting_existed_is_continued(cli: Cli, project: Path, tmp_path: Path) -> None:
    more = make_images(tmp_path / "more", ["pink", "brown"])
    stop_after(cli, project, more, 3)
    path = project / ".treelora" / "run" / "checkpoint.json"
    facts = unseal(json.loads(path.read_text()))
    for key in ALL:
        del facts["train"][key]
        facts["settings"]["train"].pop(key, None)
    path.write_bytes(seal(facts))
    done = cli("-C", project, "train-task", "--resume", *OPTIONS)
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("policy", "line"),
    [
        ("rnd-m9", r"train\.augment: 'rnd-m9' begins with none of rand, augmix"),
        ("rand-zz", r"train\.augment: 'zz' in 'rand-zz' is no key with a number, such as m9\."),
        ("rand-q9", r"train\.augment: timm does not take 'rand-q9' \(Unknown RandAugment config section\)\."),
        ("rand-m9.5", r"train\.augment: timm does not take 'rand-m9\.5' \("),
        ("rand-tnone", r"train\.augment: 'tnone' in 'rand-tnone' is no key with a number, such as m9\."),
    ],
)
def test_a_malformed_policy_is_refused_with_its_reason(
    cli: Cli, project: Path, data: Path, policy: str, line: str
) -> None:
    before = learned_hashes(project)
    done = cli("-C", project, "train-task", data / "warm", "--name", "again", "--set", f"train.augment={policy}")
    check_error(done, 2, line)
    assert learned_hashes(project) == before


@pytest.mark.parametrize(
    ("train", "line"),
    [
        (
            TrainConfig(accumulate=2),
            r"^train\.accumulate 2: the backend 'other' does nothing of the kind\. Leave it out\.$",
        ),
        (TrainConfig(augment="v0"), r"^train\.augment v0: the backend 'other'"),
    ],
)
def test_a_backend_that_does_nothing_of_the_kind_refuses(train: TrainConfig, line: str) -> None:
    other: Any = SimpleNamespace(name="other")
    check_settings(other, Config(train=TrainConfig(accumulate=1, label_smoothing=0.0, class_weights="none")))
    with pytest.raises(UsageError, match=line):
        check_settings(other, Config(train=train))
    other.honours = ("train.accumulate", "train.augment")
    check_settings(other, Config(train=train))


def test_a_task_of_one_class_is_a_task(cli: Cli, project: Path, tmp_path: Path) -> None:
    one = make_images(tmp_path / "alone", ["brown"])
    done = cli("-C", project, "train-task", one, *OPTIONS, "--set", "head.class_weights=balanced", "--json")
    assert done.code == 0, done.err
    assert done.json["scores"]["alone"]["examples"] == 8
    assert json.loads(next(project.glob("tasks/*-alone/labels.json")).read_text()) == ["brown"]
