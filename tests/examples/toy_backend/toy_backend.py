"""A backend in one file: a multilayer perceptron over the numbers of a CSV, as an example of the contract.

A table has a column ``label``, optionally ``split`` (``train`` or ``test``), and numbers in all others. The perceptron
is drawn from a seed and frozen; each task trains an adapter on its second layer and a linear head. Which task a row is
from is told by the nearest mean of a class, in frozen features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from treelora_cli.backend import adapters
from treelora_cli.backend.arithmetic import try_gradient
from treelora_cli.backend.fingerprint import hash_parameters
from treelora_cli.backend.runtime import Runtime
from treelora_cli.backend.values import (
    Change,
    DataRequest,
    ExportCheck,
    ExportOptions,
    Learned,
    Memory,
    Prediction,
    Score,
)
from treelora_cli.config import AdapterConfig, BaseConfig, Config, TrainConfig
from treelora_cli.config.fields import own_settings, setting
from treelora_cli.data.held_out import content_hash, find_recorded, set_aside
from treelora_cli.data.paths import existing
from treelora_cli.data.tables import read_table
from treelora_cli.errors import DataError, ModelError, UsageError

LAYERS = ("second",)


@dataclass(frozen=True)
class ToySettings:
    """What this backend can be told beside treelora's own settings, under ``backend_settings``."""

    inputs: int = setting(2, "numbers in a row", low=1, fixed=True)
    hidden: int = setting(16, "neurons of each layer", low=1, fixed=True)


class ToyBackend:
    """Registered as ``toy-mlp``."""

    name = "toy-mlp"
    own_settings = ToySettings

    def defaults(self) -> Config:
        return Config(adapter=AdapterConfig(rank=2, alpha=4.0), train=TrainConfig(epochs=3, lr=0.01, batch_size=8))

    def resolve_base(self, base: BaseConfig, *, offline: bool) -> BaseConfig:
        if base.model not in (None, "mlp"):
            raise ModelError(f"toy-mlp has one model, 'mlp'; got '{base.model}'.")
        return replace(base, model="mlp")

    def load(self, config: Config, runtime: Runtime) -> ToyBase:
        own = own_settings(ToySettings, config.backend_settings, "backend_settings")
        return ToyBase(config, own, runtime)


class Perceptron(nn.Module):
    """Two layers; the second is adapted."""

    def __init__(self, own: ToySettings) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(own.inputs, own.hidden)
            self.second = nn.Linear(own.hidden, own.hidden)

    def forward(self, rows: Tensor) -> Tensor:
        return self.second(self.first(rows).tanh()).tanh()


@dataclass(frozen=True)
class Example:
    label: str
    values: tuple[float, ...]

    @property
    def content(self) -> str:
        return content_hash(self.label, repr(self.values))


@dataclass(frozen=True)
class ToyTask:
    """Meets ``TaskData``."""

    labels: tuple[str, ...]
    train: list[Example]
    test: list[Example]
    change: Change | None = None
    metric: str = "accuracy"
    notes: tuple[str, ...] = ()
    numbered: bool = False
    tokens: tuple[tuple[str, bool], ...] = ()

    @property
    def train_size(self) -> int:
        return len(self.train)

    @property
    def test_size(self) -> int:
        return len(self.test)

    @property
    def held_out(self) -> tuple[str, ...]:
        return tuple(one.content for one in self.test)

    @property
    def digest(self) -> str:
        return hashlib.sha256("".join(one.content for one in [*self.train, *self.test]).encode()).hexdigest()

    @property
    def sample(self) -> str:
        return f"{list(self.train[0].values)} -> {self.train[0].label}" if self.train else ""

    def tensors(self, part: list[Example]) -> tuple[Tensor, Tensor]:
        """Return rows (n, inputs) and label indices (n,)."""
        rows = torch.tensor([one.values for one in part]).reshape(len(part), -1)
        return rows, torch.tensor([self.labels.index(one.label) for one in part], dtype=torch.int64)


def read_toy_task(request: DataRequest, inputs: int) -> ToyTask:
    """Read a table.

    Raises:
        DataError: It is missing, or not as the module says.
    """
    if request.metric not in (None, "accuracy"):
        raise DataError(f"Metric '{request.metric}' is not known here; rows are scored by accuracy.")
    train, test = [], []
    for row in read_table(existing(request.path), request.data_format, request.columns):
        values = dict(row.values)
        label, split = str(values.pop("label", "")), values.pop("split", "train")
        try:
            numbers = tuple(float(one) for one in values.values())
        except (TypeError, ValueError) as error:
            raise DataError(f"{row.where}: {error}.") from error
        if not label or len(numbers) != inputs:
            raise DataError(f"{row.where}: needs a label and {inputs} numbers (backend_settings.inputs).")
        if request.classes is None or label in request.classes:
            (test if split == "test" else train).append(Example(label, numbers))
    labels = tuple(sorted({one.label for one in train}))
    missing = sorted(set(request.classes or ()) - set(labels))
    if missing or not train:
        raise DataError(f"{request.path}: no rows of {missing or 'any class'} to learn from.")
    return _chosen(request, labels, train, test)


def _chosen(request: DataRequest, labels: tuple[str, ...], train: list[Example], test: list[Example]) -> ToyTask:
    """Choose the held-out rows, those that were held out before where that is known, and keep to the limits."""
    change = None
    if request.recorded is not None and request.recorded.held_out is not None:
        test, change = find_recorded(test, train, request.recorded.held_out, lambda one: one.content)
    elif not test:
        train, test = set_aside(train, request.held_out, str(request.seed), lambda one: one.content)
    limit = request.test_limit if request.recorded is None else request.recorded.limit
    train, test = _few(train, request.train_limit), _few(test, limit)
    return ToyTask(labels, [] if request.test_only else train, test, change)


def _few(members: list[Example], limit: int | None) -> list[Example]:
    """Return at most ``limit`` of each class."""
    count: dict[str, int] = {}
    kept = []
    for one in members:
        count[one.label] = count.get(one.label, 0) + 1
        if limit is None or count[one.label] <= limit:
            kept.append(one)
    return kept


class ToyBase:
    """Meets ``Base``."""

    layers = LAYERS

    def __init__(self, config: Config, own: ToySettings, runtime: Runtime) -> None:
        model = Perceptron(own)
        self.fingerprint = hash_parameters(model)
        self.own, self.runtime = own, runtime
        adapter = config.adapter
        assert adapter.rank is not None and adapter.alpha is not None and adapter.dropout is not None
        self.network = adapters.attach(
            model, LAYERS, rank=adapter.rank, alpha=adapter.alpha, dropout=adapter.dropout
        ).eval()

    @property
    def facts(self) -> dict[str, Any]:
        return vars(self.own)

    def frozen(self, rows: Tensor) -> Tensor:
        """Return features without the adapter, (n, hidden)."""
        with torch.no_grad(), adapters.base_only(self.network):
            return self.network(rows)

    def read_task(self, request: DataRequest) -> ToyTask:
        return read_toy_task(request, self.own.inputs)

    def session(self, task: ToyTask, memory: Memory, config: Config) -> ToySession:
        return ToySession(self, task, memory, config)

    def predictor(self, memory: Memory, inference: str) -> ToyPredictor:
        if inference != "routed":
            raise UsageError(f"--inference {inference}: toy-mlp answers 'routed' only.")
        return ToyPredictor(self, memory)

    def export_merged(self, memory: Memory, out: Path, options: ExportOptions) -> None:
        raise UsageError("toy-mlp has no merged export. Try --format adapter.")

    def export_adapter(self, memory: Memory, task: str, out: Path) -> None:
        raise UsageError("toy-mlp has no exports: no other program knows its model.")

    def load_line(self, out: Path, task: str | None) -> str:
        return ""

    def check_export(
        self, memory: Memory, out: Path, task: str | None, held_out: Sequence[tuple[str, ToyTask]]
    ) -> ExportCheck:
        raise UsageError("toy-mlp has no exports.")


class ToySession:
    """Meets ``TaskSession``."""

    def __init__(self, base: ToyBase, task: ToyTask, memory: Memory, config: Config) -> None:
        self.base, self.task, self.memory = base, task, memory
        assert config.train.batch_size is not None and config.seed is not None
        self.batch_size, self.seed = config.train.batch_size, config.seed
        self.rows, self.truth = task.tensors(task.train)
        self.head = nn.Linear(base.own.hidden, len(task.labels))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.means: Tensor

    def try_step(self, parameters: Sequence[Tensor]) -> None:
        rows = self.rows[: self.batch_size]
        try_gradient(self.base.runtime, lambda: self.base.network(rows).square().mean(), parameters)

    def try_forward(self) -> None:
        self.base.frozen(self.rows[: self.batch_size])

    def prepare(self) -> None:
        """Find the mean of each class in frozen features."""
        features = self.base.frozen(self.rows)
        self.means = torch.stack([features[self.truth == label].mean(0) for label in range(len(self.task.labels))])

    def probe_losses(self, count: int) -> Iterator[Tensor]:
        """Yield losses against the class means: the head is zero, and would give the adapter no gradient."""
        for rows, truth in list(self.batches(0))[:count]:
            distances = torch.cdist(self.base.network(rows), self.means)
            yield nn.functional.cross_entropy(-distances, truth)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(1000 * self.seed + epoch))
        for places in order.split(self.batch_size):
            yield self.rows[places], self.truth[places]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        rows, truth = batch
        return nn.functional.cross_entropy(self.head(self.base.network(rows)), truth)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.head.parameters())

    def finish(self) -> Learned:
        """Hand over the task's head, and the class means of all tasks in order."""
        tensors = {"weight": self.head.weight.detach().clone(), "bias": self.head.bias.detach().clone()}
        before = self.memory.shared()
        means = torch.cat([before["means"], self.means]) if before else self.means
        return Learned(tensors, lambda: {"means": means.clone()}, {"examples": len(self.rows)})


class ToyPredictor:
    """Meets ``Predictor``."""

    def __init__(self, base: ToyBase, memory: Memory) -> None:
        self.base, self.memory = base, memory
        self.means = memory.shared()["means"]
        self.task_of = torch.tensor([number for number, task in enumerate(memory.tasks) for _ in task.labels])

    def evaluate(self, task: ToyTask) -> Score:
        rows, _ = task.tensors(task.test)
        answers = self._answers(rows)
        right = [answer.output == one.label for answer, one in zip(answers, task.test, strict=True)]
        return Score(sum(right) / max(1, len(right)), len(right), None)

    def predict(self, inputs: Sequence[str]) -> list[Prediction]:
        """Answer rows written as ``1.5,2``."""
        try:
            rows = torch.tensor([[float(one) for one in text.split(",")] for text in inputs])
        except ValueError as error:
            raise DataError(f"An input is numbers with commas: {error}.") from error
        return self._answers(rows.reshape(len(inputs), self.base.own.inputs))

    @torch.no_grad()
    def _answers(self, rows: Tensor) -> list[Prediction]:
        answers: list[Prediction] = []
        nearest = torch.cdist(self.base.frozen(rows), self.means).argmin(1) if len(rows) else []
        for row, column in zip(rows, nearest, strict=True):
            task = self.memory.tasks[int(self.task_of[column])]
            adapters.write_slot(self.base.network, task.adapter())
            head = task.tensors()
            logits = self.base.network(row[None]) @ head["weight"].T + head["bias"]
            sure, best = logits.softmax(1)[0].max(0)
            answers.append(Prediction(task.labels[int(best)], task.name, float(sure)))
        return answers
