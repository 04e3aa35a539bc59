"""An image task learned the plain way: every view of every step runs through the whole network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from treelora_backends.compiled import Compilation
from treelora_backends.objective import Objective, class_weights, summed_in_parts
from treelora_backends.vit.images import ImageTask, Pictures, chosen_views, in_parts, shuffled_views
from treelora_cli import seeds
from treelora_cli.backend.arithmetic import try_gradient
from treelora_cli.backend.values import Learned, Score
from treelora_cli.config import Config
from treelora_cli.data.names import label_key
from treelora_cli.heads.gaussians import Gaussian

if TYPE_CHECKING:
    from treelora_backends.vit.augment import Augment
    from treelora_backends.vit.loaded import LoadedVit

CHUNK = 256
"""Images run at a time where no gradient is needed."""
VIEWS = 2
"""Plain and mirrored, one of them drawn for each image and epoch, as in ``VitSession`` with
``head.views: 2``; a plain pass costs the same for either."""


class ClassTable:
    """The classes seen, in order of arrival, and the tasks that hold them; one in another spelling is the same."""

    def __init__(self) -> None:
        self.names: list[str] = []
        """Keys of the classes, see ``label_key``, (K,)."""
        self.first_task: list[int] = []
        """Index of the task in which each class first came, (K,)."""
        self.tasks: list[tuple[str, ...]] = []

    def add(self, tasks: Sequence[ImageTask]) -> None:
        """Append the classes of tasks that are learned at once."""
        keys = distinct_keys(tasks)
        for key in keys:
            if key not in self.names:
                self.names.append(key)
                self.first_task.append(len(self.tasks))
        self.tasks.append(keys)

    def rows(self, tasks: Sequence[ImageTask]) -> Tensor:
        """Return the indices of the tasks' classes, each once, (k,)."""
        return torch.tensor([self.names.index(key) for key in distinct_keys(tasks)], dtype=torch.int64)

    def truth(self, task: ImageTask) -> Tensor:
        """Return the index of each of the task's labels, -1 for one never seen."""
        found = {name: index for index, name in enumerate(self.names)}
        return torch.tensor([found.get(label_key(label), -1) for label in task.labels], dtype=torch.int64)


def distinct_keys(tasks: Sequence[ImageTask]) -> tuple[str, ...]:
    """Return the keys of the classes of tasks that are learned at once, each once, in order of arrival."""
    return tuple(dict.fromkeys(label_key(label) for task in tasks for label in task.labels))


def features_of(base: LoadedVit, images: Tensor) -> Tensor:
    """Return the pooled features of normalised images by the network as it is, (B, C)."""
    with base.runtime.autocast():
        return base.trunk.whole(images)


@torch.no_grad()
def score_images(base: LoadedVit, table: ClassTable, task: ImageTask, answer: Callable[[Tensor], Tensor]) -> Score:
    """Score held-out images; ``answer`` turns normalised images (B, 3, H, W) into indices of classes, (B,)."""
    device = base.runtime.device
    truth = table.truth(task).to(device)
    right = 0
    for start in range(0, len(task.test), CHUNK):
        pixels = task.test.pixels[start : start + CHUNK].to(device)
        labels = task.test.labels[start : start + CHUNK].to(device)
        right += int((answer(base.preprocessing.normalise(pixels)) == truth[labels]).sum())
    return Score(right / max(1, len(task.test)), len(task.test), None)


class PlainSession:
    """Meets ``TaskSession``.

    Args:
        base: The loaded network.
        tasks: One task, or several learned at once.
        config: Batch size and seed.
        index: Of the task, from 0; the order of its data depends on it.
        layer: Classifier of the tasks' classes; without one there is nothing to train and no step is taken.
        own: Index of the tasks' classes among all seen, in the layer's order, (k,).
        rate: Factor on the layer's output: how many times faster than the adapter it learns under Adam.
    """

    def __init__(
        self,
        base: LoadedVit,
        tasks: Sequence[ImageTask],
        config: Config,
        index: int,
        layer: nn.Linear | None,
        own: Tensor,
        rate: float = 1.0,
    ) -> None:
        assert config.train.batch_size is not None and config.seed is not None
        self.base = base
        self.layer = layer
        self.own = own
        self.rate = rate
        self.batch_size: int = config.train.batch_size
        assert config.train.accumulate is not None
        self.parts: int = config.train.accumulate
        self.augment = base.augmenting(config)
        self.seed: int = seeds.of_task(config.seed, index)
        self.pictures = _Joined([task.train for task in tasks])
        keys = distinct_keys(tasks)
        local = [
            torch.tensor([keys.index(label_key(label)) for label in task.labels])[task.train.labels] for task in tasks
        ]
        self.labels = torch.cat(local)
        """Index into the layer's rows, (n,)."""
        weights = class_weights(config.train.class_weights, self.labels, len(keys), base.runtime)
        weights = None if weights is None else weights.to(base.runtime.device)
        self.objective = Objective(config.train.label_smoothing or 0.0, weights)
        self.compilation = Compilation(config.train.compile, lambda: list(base.trunk.blocks))

    def try_step(self, parameters: Sequence[Tensor]) -> None:
        """Compute a loss and its gradient through the adapter on one full-sized batch."""
        rows = torch.arange(min(self.batch_size, len(self.pictures)))
        try_gradient(
            self.base.runtime, lambda: self._features(rows, torch.zeros_like(rows)).square().mean(), parameters
        )

    @torch.no_grad()
    def try_forward(self) -> None:
        """Compute features of one full-sized batch without a gradient."""
        rows = torch.arange(min(self.batch_size, len(self.pictures)))
        self._features(rows, torch.zeros_like(rows))

    def prepare(self) -> None:
        """Nothing is computed ahead."""

    def probe_losses(self, count: int) -> Iterator[Tensor]:
        """Yield losses of the first plain mini-batches of one shuffle, the same at every call."""
        for rows, views in self.probe_batches(count):
            yield self.misfit(self._features(rows, views), rows)

    def probe_batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows, views) of those mini-batches, both (B,)."""
        generator = torch.Generator().manual_seed(seeds.of_probe(self.seed))
        order = torch.randperm(len(self.pictures), generator=generator)
        for rows in order.split(self.batch_size)[:count]:
            yield rows, torch.zeros_like(rows)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass; none without a layer to train."""
        return 0 if self.layer is None else -(-len(self.pictures) // (self.batch_size * self.parts))

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows, views) of each step, both (B,), in the order of ``VitSession``."""
        seed = seeds.of_order(self.seed, epoch)
        yield from shuffled_views(len(self.pictures), VIEWS, self.steps_per_epoch, seed)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy over the tasks' own classes."""
        with self.compilation.used():
            return self.summed(batch, self._loss_of_part, self.parameters())

    def summed(
        self,
        batch: tuple[Tensor, Tensor],
        loss: Callable[[Tensor, Tensor], Tensor],
        parameters: Sequence[nn.Parameter],
    ) -> Tensor:
        """Return the mean loss of a step's images; of accumulated batches, one after the other is in memory.

        Args:
            batch: Rows and views, both (B,).
            loss: Returns the mean over some of them.
            parameters: All that is trained beside the adapter.
        """
        if self.parts == 1:
            return loss(*batch)
        trained = [one for one in self.base.network.parameters() if one.requires_grad]
        return summed_in_parts(in_parts(batch, self.parts, loss), [*trained, *parameters])

    def _loss_of_part(self, rows: Tensor, views: Tensor) -> Tensor:
        return self.misfit(features_of(self.base, self.images(rows, views, self.augment)), rows)

    def misfit(self, features: Tensor, rows: Tensor) -> Tensor:
        """Cross-entropy of the layer's answers to the features (B, C) of images ``rows`` (B,)."""
        assert self.layer is not None
        logits = self.layer(features) * self.rate
        return self.objective(logits, self.labels[rows].to(logits.device))

    def parameters(self) -> list[nn.Parameter]:
        """Return the layer's."""
        return [] if self.layer is None else list(self.layer.parameters())

    def finish(self) -> Learned:
        """Nothing is handed over: the contender reads what it needs."""
        return Learned({}, dict, {})

    # -- what heads measure ---------------------------------------------------------------------------

    @torch.no_grad()
    def features(self) -> Tensor:
        """Return the pooled features of all training images, plain, by the network as it is, (n, C)."""
        parts = torch.arange(len(self.pictures)).split(CHUNK)
        return torch.cat([self._features(rows, torch.zeros_like(rows)) for rows in parts])

    def classes(self) -> Tensor:
        """Return the class of each training image among all seen, (n,)."""
        return self.own[self.labels].to(self.base.runtime.device)

    def by_class(self, features: Tensor) -> dict[int, Gaussian]:
        """Return each class's Gaussian by its index among all seen."""
        classes = self.classes()
        return {one: Gaussian.measure(features[classes == one]) for one in self.own.tolist()}

    def _features(self, rows: Tensor, views: Tensor) -> Tensor:
        return features_of(self.base, self.images(rows, views))

    def images(self, rows: Tensor, views: Tensor, augment: Augment | None = None) -> Tensor:
        """Return chosen views of training images, normalised, (B, 3, H, W), on request changed at random."""
        pixels = self.pictures.take(rows)
        pixels = pixels if augment is None else augment(pixels)
        return chosen_views(self.base.preprocessing.normalise(pixels.to(self.base.runtime.device)), views)


class _Joined:
    """Images of several tasks by one running index, without a copy of them."""

    def __init__(self, parts: Sequence[Pictures]) -> None:
        self.parts = parts
        self.starts = [sum(len(part) for part in parts[:index]) for index in range(len(parts))]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def take(self, rows: Tensor) -> Tensor:
        """Return images as bytes, (B, 3, H, W)."""
        if len(self.parts) == 1:
            return self.parts[0].pixels[rows]
        taken = torch.empty(len(rows), *self.parts[0].pixels.shape[1:], dtype=torch.uint8)
        for part, start in zip(self.parts, self.starts, strict=True):
            here = (rows >= start) & (rows < start + len(part))
            taken[here] = part.pixels[rows[here] - start]
        return taken
