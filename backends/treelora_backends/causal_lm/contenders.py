"""Language models under contenders: the plain way to train on a task, and the two ways to answer later.

Symbols: ``n`` examples, ``F`` features of an input, ``T`` tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from treelora_backends.causal_lm.batches import labelled_padded, shuffled_batches
from treelora_backends.causal_lm.memory import describe
from treelora_backends.causal_lm.predictor import LmPredictor
from treelora_backends.causal_lm.steps import PLAIN, LmSteps, in_parts
from treelora_backends.causal_lm.task import LmTask, answer_classes
from treelora_backends.objective import Objective, class_weights
from treelora_cli import seeds
from treelora_cli.backend import adapters
from treelora_cli.backend.arithmetic import try_gradient
from treelora_cli.backend.values import Learned, Memory, Score, TaskMemory
from treelora_cli.config import Config
from treelora_cli.data.examples import TextExample
from treelora_cli.errors import DataError
from treelora_cli.heads.gaussians import AlignSettings, Gaussian, align, covariance_root
from treelora_cli.heads.ridge import LinearHead

if TYPE_CHECKING:
    from treelora_backends.causal_lm.loaded import LoadedLm
    from treelora_cli.backend.contract import ContenderModel

_FLOAT = 4
_SHRINKAGE = 0.1
"""Share of the mean variance in the routing covariance: features outnumber examples."""
_ROUTING = AlignSettings(epochs=20)


class PlainLmSession(LmSteps):
    """Meets ``TaskSession``: whole batches through the whole model; the loss is on the answers.

    Args:
        base: The loaded model.
        tasks: One task, or several learned at once.
        config: Batch size, seed and gradient checkpointing.
        index: Of the task, from 0; the order of its data depends on it.
    """

    def __init__(self, base: LoadedLm, tasks: Sequence[LmTask], config: Config, index: int) -> None:
        assert config.seed is not None
        self.tasks = tasks
        self.examples = [one for task in tasks for one in task.train]
        if not self.examples:
            raise DataError("No training examples.")
        lengths = [len(one) for one in self.examples]
        seed = seeds.of_task(config.seed, index)
        super().__init__(base, lengths, len(lengths), config.train, seed)
        self.answers = answer_classes(tasks, config.train.class_weights)
        weights = class_weights(config.train.class_weights, self.answers, int(self.answers.max()) + 1, base.runtime)
        self.objective = replace(self.objective, weights=weights)
        if config.train.grad_checkpointing:
            self.checkpoint_gradients("grad_checkpointing")

    def try_step(self, parameters: Sequence[Tensor]) -> None:
        """Compute the loss of a few examples of middling length, and its gradient."""
        self.base.network.eval()
        try_gradient(self.base.runtime, lambda: self.loss_of(self.trial_places()), parameters)

    def try_forward(self) -> None:
        """Compute the same loss without a gradient."""
        self.base.network.eval()
        with torch.no_grad(), self.base.runtime.autocast():
            self.loss_of(self.trial_places())

    def prepare(self) -> None:
        """Nothing is computed ahead."""

    def probe_losses(self, count: int) -> Iterator[Tensor]:
        """Yield losses of the first mini-batches of one shuffle, without dropout, the same at every call."""
        self.base.network.eval()
        batches = shuffled_batches(self.lengths, self.steps_per_epoch, seeds.of_probe(self.seed))
        for places, _ in zip(batches, range(count), strict=False):
            yield self.loss_of(places)

    def loss_of(self, places: Sequence[int], objective: Objective = PLAIN) -> Tensor:
        """Return the mean loss over the labels of some examples, with dropout as it is set."""
        parts = in_parts(places, self.parts)
        if len(parts) == 1:
            return self._loss_of_part(parts[0], objective)
        labels = [sum(len(self.examples[place].places) for place in part) for part in parts]
        return self.summed(parts, lambda part: self._loss_of_part(part, objective), labels)

    def _loss_of_part(self, places: list[int], objective: Objective) -> Tensor:
        chosen = [self.examples[place] for place in places]
        few = self.compilation.mode is not None
        batch = labelled_padded(chosen, self.base.encoder, self.base.lm.device, few=few)
        weights = objective.of_examples(self.answers[places])
        if weights is not None:
            weights = weights.to(self.base.lm.device)
        with self.base.runtime.autocast():
            return self.base.lm.loss(batch, smoothing=objective.smoothing, weights=weights)

    def finish(self) -> Learned:
        """Nothing is handed over: the contender reads what it needs."""
        return Learned({}, dict, {})


class AnswerContender:
    """``answer``: one adapter for all tasks; the model's own output layer answers.

    An example is rendered as its own data says and scored as for ``treelora`` with inference ``latest``.

    Source: the evaluation of sequential LoRA and O-LoRA (Wang et al., Findings of EMNLP 2023).
    """

    def __init__(self, base: LoadedLm) -> None:
        self.base = base
        self.memory = _nothing()
        self.index = 0
        self._open: PlainLmSession

    def session(self, tasks: Sequence[LmTask], config: Config) -> PlainLmSession:
        """Open tasks."""
        self._open = PlainLmSession(self.base, tasks, config, self.index)
        self.index += 1
        return self._open

    def learned(self) -> None:
        """Note how the tasks' inputs are rendered and answered."""
        self.memory = _with_tasks(self.base, self.memory, self._open.tasks)
        del self._open

    def evaluate(self, task: LmTask) -> Score:
        """Score with the network as it is."""
        self.base.known_answers.clear()  # they are kept by the adapter, and a strategy may change frozen weights
        return LmPredictor(self.base, self.memory, "latest").evaluate(task)

    def kept_bytes(self) -> int:
        """One adapter."""
        return adapters.slot_bytes(self.base.network, self.base.layers)


class RoutedLmContender:
    """``routed``: an adapter for each task, chosen for an input by the bare model's features.

    Task-identity inference as in HiDe-Prompt: inputs are summarised as Gaussians of the uninstructed features, one
    for each closed answer of each task, or for the task where answers are open, with one covariance for
    all; a linear head is trained on samples of them, and the task of its likeliest column answers. A task's own
    output layer is the model's, so there is no task-adaptive head to train.

    Source: HiDe-Prompt (Wang et al., NeurIPS 2023), with LoRA for prompts as in HiDe-PET.
    """

    def __init__(self, base: LoadedLm) -> None:
        self.base = base
        self.memory = _nothing()
        self.means: list[Tensor] = []
        self.column_task: list[int] = []
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)
        self.examples = 0
        self.identity: LinearHead
        self._open: PlainLmSession

    def session(self, tasks: Sequence[LmTask], config: Config) -> PlainLmSession:
        """Open tasks."""
        self._open = PlainLmSession(self.base, tasks, config, len(self.memory.tasks))
        return self._open

    def learned(self) -> None:
        """Keep the adapter, measure the bare features, and train the head on samples."""
        for task in self._open.tasks:
            self._measure(task)
            self.memory = _with_tasks(self.base, self.memory, [task])
        gaussians = self.gaussians()
        width = len(self.means[0])
        empty = LinearHead(torch.zeros(len(gaussians), width), torch.zeros(len(gaussians)))
        self.identity = align(empty, gaussians, range(len(gaussians)), _ROUTING, self._open.seed)
        del self._open

    def _measure(self, task: LmTask) -> None:
        features = self.base.lm.routing(self.base.read_features(task.listing.train, "Features"))  # (n, F)
        answers = [one.answer if task.labels else "" for one in task.listing.train]
        if not self.means:
            self.scatter = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
        for answer in dict.fromkeys(answers):
            own = features[torch.tensor([one == answer for one in answers])]
            deviation = (own - own.mean(dim=0)).double()
            self.means.append(own.mean(dim=0))
            self.column_task.append(len(self.memory.tasks))
            self.scatter += deviation.T @ deviation
        self.examples += len(features)

    def gaussians(self) -> list[Gaussian]:
        """Return the columns' distributions: their means, and the pooled covariance, shrunk towards a multiple of I."""
        covariance = self.scatter / max(1, self.examples - len(self.means))
        level = covariance.diagonal().mean()
        covariance = (1 - _SHRINKAGE) * covariance
        covariance.diagonal().add_(_SHRINKAGE * level)
        root = covariance_root(covariance)
        return [Gaussian(mean, root) for mean in self.means]

    def route(self, examples: Sequence[TextExample]) -> list[int]:
        """Return the likeliest task of each input."""
        features = self.base.lm.routing(self.base.read_features(examples, "Choosing tasks"))
        columns = self.identity(features).argmax(dim=1)
        return [self.column_task[int(column)] for column in columns]

    def evaluate(self, task: LmTask) -> Score:
        """Score; every input is answered through one task's adapter."""
        return LmPredictor(self.base, self.memory, "routed", self.route).evaluate(task)

    def kept_bytes(self) -> int:
        """All adapters, the head, the means and the pooled scatter."""
        heads = self.identity.weight.numel() + self.identity.bias.numel() + sum(len(mean) for mean in self.means)
        scatter = self.scatter.numel() * self.scatter.element_size()
        return (
            adapters.slot_bytes(self.base.network, self.base.layers) * len(self.memory.tasks) + _FLOAT * heads + scatter
        )


def _nothing() -> Memory:
    return Memory((), dict)


def _with_tasks(base: LoadedLm, memory: Memory, tasks: Sequence[LmTask]) -> Memory:
    """Return the memory after tasks whose trained adapter is in the slot."""
    trained = adapters.read_slot(base.network, base.layers, base.scale)
    for task in tasks:
        tensors = describe(task)
        name = f"{len(memory.tasks):03d}"
        one = TaskMemory(name, task.labels, task.metric, lambda: trained, partial(dict, tensors))
        memory = memory.with_task(one, dict)
    return memory


_HEADS: dict[str, Any] = {"answer": AnswerContender, "routed": RoutedLmContender}


def make_contender(base: LoadedLm, head: str, _config: Config) -> ContenderModel:
    """Return the model under a kind of head."""
    return cast("ContenderModel", _HEADS[head](base))
