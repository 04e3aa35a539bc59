"""How contenders learn and answer on texts: every head against numbers worked out by hand or in closed form."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import STREAM, plain_runtime
from tiny_lm import save_model
from treelora_backends.causal_lm.backend import CausalLmBackend
from treelora_backends.causal_lm.contenders import PlainLmSession, RoutedLmContender
from treelora_backends.causal_lm.session import LmSession

from treelora_cli.backend import adapters
from treelora_cli.backend.contract import ContenderModel
from treelora_cli.backend.values import DataRequest, Memory
from treelora_cli.compare.worker import Contest
from treelora_cli.config import AdapterConfig, BaseConfig, Config, TrainConfig, resolve
from treelora_cli.learning.stream import PlannedTask
from treelora_cli.methods.catalogue import load_method


def planned(data: Path, *names: str) -> list[PlannedTask]:
    return [PlannedTask(name, DataRequest(path=data / name), None) for name in names]


def contest_of(base: Any, model: ContenderModel, method: str, config: Config) -> Contest:
    return Contest(base, model, load_method(method).make(), config, len(STREAM), base.runtime)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    words = {"moods": {"good": "happy glad", "bad": "sad sick"}, "colours": {"red": "apple rose", "green": "leaf frog"}}
    for task, labels in words.items():
        rows = [
            {"sentence": f"{task} {word} {number}", "label": label}
            for label, found in labels.items()
            for word in found.split()
            for number in range(5)
        ]
        (root / task).mkdir()
        for part in ("train", "test"):
            (root / task / f"{part}.json").write_text(json.dumps(rows))
        (root / task / "labels.json").write_text(json.dumps(list(labels)))
    return root


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_model(tmp_path_factory.mktemp("llama"), "llama"))


def load_lm(model: Path) -> tuple[Any, Config]:
    flags = Config(
        base=BaseConfig(model=str(model)),
        adapter=AdapterConfig(dropout=0.0),
        train=TrainConfig(epochs=2, batch_size=4, lr=0.01, precision="fp32"),
    )
    backend = CausalLmBackend()
    config = resolve(flags, Config(), backend.defaults())
    return backend.load(config, plain_runtime()), config


def test_the_plain_language_session_has_the_order_and_the_loss_of_ours(llama: Path, texts: Path) -> None:
    base, config = load_lm(llama)
    task = base.read_task(DataRequest(path=texts / "moods"))
    plain, ours = PlainLmSession(base, [task], config, 0), LmSession(base, task, Memory((), dict), config)
    assert list(plain.batches(1)) == list(ours.batches(1)) and plain.steps_per_epoch == 5
    batch = next(plain.batches(0))
    torch.testing.assert_close(plain.loss(batch), ours.loss(batch))
    assert [float(one) for one in plain.probe_losses(3)] == [float(one) for one in plain.probe_losses(3)]
    assert len(list(plain.probe_losses(99))) == 5


def test_routed_language_statistics_are_those_of_the_bare_features(llama: Path, texts: Path) -> None:
    base, config = load_lm(llama)
    model = RoutedLmContender(base)
    contest = contest_of(base, model, "hidelora", config)
    scatter, count = 0.0, 0
    for name in ("moods", "colours"):
        contest.learn(planned(texts, name), config)
        examples = base.read_task(DataRequest(path=texts / name)).listing.train
        features = base.lm.routing(base.read_features(examples, "")).double()
        for label in dict.fromkeys(one.answer for one in examples):
            own = features[torch.tensor([one.answer == label for one in examples])]
            torch.testing.assert_close(model.means[count].double(), own.mean(dim=0), rtol=1e-4, atol=1e-5)
            scatter = scatter + (own - own.mean(dim=0)).T @ (own - own.mean(dim=0))
            count += 1
    torch.testing.assert_close(model.scatter, scatter, rtol=1e-3, atol=1e-3)
    assert model.column_task == [0, 0, 1, 1]
    held = [SimpleNamespace(content=f"{task} {word} 3") for task, word in (("moods", "sad"), ("colours", "leaf"))]
    assert model.route(held) == [0, 1]
    assert [len(row) for row in contest.matrix.rows] == [1, 2]


def test_the_answer_head_scores_as_the_newest_adapter_does(llama: Path, texts: Path) -> None:
    from treelora_backends.causal_lm.predictor import LmPredictor

    base, config = load_lm(llama)
    model = base.contender("answer", config)
    contest = contest_of(base, model, "seqlora", config)
    for name in ("moods", "colours"):
        contest.learn(planned(texts, name), config)
    task = base.read_task(DataRequest(path=texts / "moods", test_only=True))
    trained = adapters.read_slot(base.network, base.layers, base.scale)
    score = LmPredictor(base, model.memory, "latest").evaluate(task)
    assert contest.matrix.rows[1][0] == score.value
    assert model.kept_bytes() == 4 * sum(a.numel() + b.numel() for a, b in zip(trained.down, trained.up, strict=True))
    for key in base.known_answers:  # they are kept by the adapter, and a strategy may change the frozen weights
        base.known_answers[key] = ("neither", 0.0)
    assert model.evaluate(task).value == score.value > 0
