"""Vision transformers under contenders: the whole network for every view, one head kind for each class below.

Symbols: ``n`` images, ``C`` width of the pooled features, ``K`` classes seen, ``k`` classes of a task.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from treelora_backends.vit.contenders.plain import ClassTable, PlainSession, features_of, score_images
from treelora_backends.vit.contenders.prompts import (
    L2P,
    DualPrompt,
    DualPromptSettings,
    L2PSettings,
    PromptedVit,
    PromptSession,
    bare,
)
from treelora_backends.vit.images import ImageTask
from treelora_cli.backend import adapters
from treelora_cli.backend.adapters import AdapterWeights
from treelora_cli.backend.values import Score
from treelora_cli.config import Config
from treelora_cli.heads.gaussians import AlignSettings, Gaussian, RandomRidge, align, class_means
from treelora_cli.heads.ridge import LinearHead

if TYPE_CHECKING:
    from treelora_backends.vit.loaded import LoadedVit
    from treelora_cli.backend.contract import ContenderModel

_FLOAT = 4
_SLOW_ADAPTER = 10.0
"""How many times faster than the adapter SLCA's head learns."""
_SLCA = AlignSettings(epochs=5, logit_scale=0.1)
"""SLCA's epochs of alignment, samples per class and temperature."""
_HIDE = AlignSettings(epochs=20)
"""Epochs of both of HiDe's heads on samples; its losses are plain cross-entropy."""


class LinearContender:
    """``linear``: one classifier that grows with the classes, on the adapted network's pooled features.

    A task trains the rows of its own classes by cross-entropy over them alone, which forgets least; the others
    stay as they are. A class that comes back is trained on.

    Source: the usual head of sequential fine-tuning, as in SLCA (Zhang et al., ICCV 2023).

    Args:
        base: The loaded network.
        rate: How many times faster than the adapter the head learns.
    """

    def __init__(self, base: LoadedVit, rate: float = 1.0) -> None:
        self.base = base
        self.rate = rate
        self.table = ClassTable()
        width, device = base.trunk.width, base.runtime.device
        self.head = LinearHead(torch.zeros(0, width, device=device), torch.zeros(0, device=device))
        self._open: PlainSession

    def session(self, tasks: Sequence[ImageTask], config: Config) -> PlainSession:
        """Open tasks with the rows of their classes as a layer of its own."""
        self.table.add(tasks)
        grown = len(self.table.names) - len(self.head.bias)
        self.head = LinearHead(
            torch.cat([self.head.weight, self.head.weight.new_zeros(grown, self.base.trunk.width)]),
            torch.cat([self.head.bias, self.head.bias.new_zeros(grown)]),
        )
        own = self.table.rows(tasks)
        layer = nn.Linear(self.base.trunk.width, len(own)).to(self.base.runtime.device)
        with torch.no_grad():
            layer.weight.copy_(self.head.weight[own] / self.rate)
            layer.bias.copy_(self.head.bias[own] / self.rate)
        self._open = PlainSession(self.base, tasks, config, len(self.table.tasks) - 1, layer, own, self.rate)
        return self._open

    def learned(self) -> None:
        """Write the trained rows back; the others are not touched."""
        session = self._open
        assert session.layer is not None
        with torch.no_grad():
            self.head.weight[session.own] = session.layer.weight * self.rate
            self.head.bias[session.own] = session.layer.bias * self.rate
        del self._open

    def evaluate(self, task: ImageTask) -> Score:
        """Score over all classes seen."""
        return score_images(self.base, self.table, task, lambda x: self.head(features_of(self.base, x)).argmax(dim=1))

    def kept_bytes(self) -> int:
        """One adapter and the head."""
        return adapters.slot_bytes(self.base.network, self.base.layers) + self.head_bytes()

    def head_bytes(self) -> int:
        """Return the bytes of the head alone."""
        return _FLOAT * (self.head.weight.numel() + self.head.bias.numel())


class AlignedContender:
    """``aligned``: slow adapter, fast head, and after each task the head is trained on Gaussians of all classes.

    Source: SLCA (Zhang et al., ICCV 2023), slow learner and classifier alignment: minimise
    ``-log softmax(l / (0.1 |l|))_y`` over samples of ``N(mean_y, covariance_y)`` for all classes y. The next task goes
    on from the head before alignment.
    """

    def __init__(self, base: LoadedVit) -> None:
        self.base = base
        self.linear = LinearContender(base, rate=_SLOW_ADAPTER)
        self.gaussians: dict[int, Gaussian] = {}
        self.aligned = self.linear.head
        self._open: PlainSession

    def session(self, tasks: Sequence[ImageTask], config: Config) -> PlainSession:
        """Open tasks."""
        self._open = self.linear.session(tasks, config)
        return self._open

    def learned(self) -> None:
        """Measure the new classes by the network as it is, then align."""
        session = self._open
        features = session.features()
        self.linear.learned()
        self.gaussians |= session.by_class(features)
        group = torch.tensor(self.linear.table.first_task, device=features.device)
        targets = list(self.gaussians)
        self.aligned = align(self.linear.head, list(self.gaussians.values()), targets, _SLCA, session.seed, group)
        del self._open

    def evaluate(self, task: ImageTask) -> Score:
        """Score over all classes seen, by the aligned head."""
        table = self.linear.table
        return score_images(self.base, table, task, lambda x: self.aligned(features_of(self.base, x)).argmax(dim=1))

    def kept_bytes(self) -> int:
        """One adapter, both heads, and each class's mean and covariance (its factor is as large)."""
        heads = _FLOAT * (self.aligned.weight.numel() + self.aligned.bias.numel())
        return self.linear.kept_bytes() + heads + _gaussian_bytes(self.gaussians.values())


class RoutedContender:
    """``routed``: an adapter for each task, chosen for an image by the uninstructed network's features.

    Three parts, each with its own objective: within-task prediction trains a task's adapter with a classifier of
    its own classes; task-identity inference is a linear head on features of the bare network, trained on
    Gaussians of all classes seen; task-adaptive prediction is a linear head over all classes on the adapted
    features, trained on Gaussians of those.

    Source: HiDe-Prompt (Wang et al., NeurIPS 2023), its hierarchical components, with LoRA for prompts as in HiDe-PET.
    Covariances are kept whole for each class, the largest of the choices there.
    """

    def __init__(self, base: LoadedVit) -> None:
        self.base = base
        self.linear = LinearContender(base)
        self.adapters: list[AdapterWeights] = []
        self.column_task: list[int] = []
        self.column_class: list[int] = []
        self.bare: list[Gaussian] = []
        self.adapted: list[Gaussian] = []
        self.identity: LinearHead
        self.prediction: LinearHead
        self._open: PlainSession

    def session(self, tasks: Sequence[ImageTask], config: Config) -> PlainSession:
        """Open a task; within it, only its own classes compete."""
        self._open = self.linear.session(tasks, config)
        return self._open

    def learned(self) -> None:
        """Keep the adapter, measure both kinds of features, and train both heads on samples."""
        session, base = self._open, self.base
        self.adapters.append(adapters.read_slot(base.network, base.layers, base.scale))
        adapted = session.by_class(session.features())
        with adapters.base_only(base.network):
            bare = session.by_class(session.features())
        self.linear.learned()
        self.column_task += [len(self.adapters) - 1] * len(adapted)
        self.column_class += list(adapted)
        self.adapted += adapted.values()
        self.bare += bare.values()
        columns, width = len(self.bare), base.trunk.width
        device = base.runtime.device
        empty = LinearHead(torch.zeros(columns, width, device=device), torch.zeros(columns, device=device))
        self.identity = align(empty, self.bare, range(columns), _HIDE, session.seed)
        self.prediction = align(self.linear.head, self.adapted, self.column_class, _HIDE, session.seed)
        del self._open

    def evaluate(self, task: ImageTask) -> Score:
        """Score over all classes seen; every image is answered through one task's adapter."""
        score = score_images(self.base, self.linear.table, task, self._answer)
        adapters.write_slot(self.base.network, self.adapters[-1])
        return score

    @torch.no_grad()
    def _answer(self, images: Tensor) -> Tensor:
        task_of = torch.tensor(self.column_task, device=images.device)
        with adapters.base_only(self.base.network):
            chosen = task_of[self.identity(features_of(self.base, images)).argmax(dim=1)]
        answers = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        for one in chosen.unique().tolist():
            rows = (chosen == one).nonzero().squeeze(1)
            adapters.write_slot(self.base.network, self.adapters[one])
            answers[rows] = self.prediction(features_of(self.base, images[rows])).argmax(dim=1)
        return answers

    def kept_bytes(self) -> int:
        """All adapters, the heads, and each class's two means and covariances."""
        heads = self.linear.head_bytes()
        heads += sum(_FLOAT * (head.weight.numel() + head.bias.numel()) for head in (self.identity, self.prediction))
        adapted = adapters.slot_bytes(self.base.network, self.base.layers) * len(self.adapters)
        return heads + adapted + _gaussian_bytes([*self.bare, *self.adapted])


class RidgeContender:
    """``ridge``: the first task adapts the network, which then stays; random features and a solved head do the rest.

    Source: RanPAC (McDonnell et al., NeurIPS 2023), algorithm 1 with its phase 1 (first-session adaptation), ReLU, and
    a penalty for each task, chosen by leaving out each image once; the paper holds out a fifth of them.

    Args:
        base: The loaded network.
        width: Random features; the paper takes 10,000.
        seed: Of the projection.
    """

    def __init__(self, base: LoadedVit, width: int, seed: int) -> None:
        self.base = base
        self.ridge = RandomRidge(base.trunk.width, width, seed, base.runtime.device)
        self.table = ClassTable()
        self.weight: Tensor
        self._open: PlainSession

    def session(self, tasks: Sequence[ImageTask], config: Config) -> PlainSession:
        """Open tasks; only the first trains, with a classifier that is then thrown away."""
        first = not self.table.tasks
        self.table.add(tasks)
        own = self.table.rows(tasks)
        layer = nn.Linear(self.base.trunk.width, len(own)).to(self.base.runtime.device) if first else None
        if layer is not None:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self._open = PlainSession(self.base, tasks, config, len(self.table.tasks) - 1, layer, own)
        return self._open

    def learned(self) -> None:
        """Count the tasks' images in and solve."""
        classes = self._open.classes()
        self.ridge.add(self._open.features(), classes, len(self.table.names))
        self.weight = self.ridge.solve()
        del self._open

    def evaluate(self, task: ImageTask) -> Score:
        """Score over all classes seen."""

        def answer(images: Tensor) -> Tensor:
            return (self.ridge.expand(features_of(self.base, images)) @ self.weight.T).argmax(dim=1)

        return score_images(self.base, self.table, task, answer)

    def kept_bytes(self) -> int:
        """One adapter, the projection, the Gram matrix and the classes' sums."""
        tensors = (self.ridge.projection, self.ridge.gram, self.ridge.sums)
        return adapters.slot_bytes(self.base.network, self.base.layers) + _FLOAT * sum(
            tensor.numel() for tensor in tensors
        )


class MeanContender:
    """``mean``: frozen features, each class by its mean, the nearest by cosine; nothing is trained.

    Source: SimpleCIL in Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models" (2023).
    """

    def __init__(self, base: LoadedVit) -> None:
        self.base = base
        self.table = ClassTable()
        self.means = torch.zeros(0, base.trunk.width, device=base.runtime.device)
        self._open: PlainSession

    def session(self, tasks: Sequence[ImageTask], config: Config) -> PlainSession:
        """Open tasks without a step to take."""
        self.table.add(tasks)
        self._open = PlainSession(self.base, tasks, config, len(self.table.tasks) - 1, None, self.table.rows(tasks))
        return self._open

    def learned(self) -> None:
        """Take the classes' means; a class that comes back is measured anew."""
        session = self._open
        with adapters.base_only(self.base.network):
            features = session.features()
        count = len(self.table.names)
        fresh = class_means(features, session.classes(), count)
        grown = torch.cat([self.means, self.means.new_zeros(count - len(self.means), self.means.shape[1])])
        grown[session.own] = fresh[session.own]
        self.means = grown
        del self._open

    def evaluate(self, task: ImageTask) -> Score:
        """Score over all classes seen."""
        prototypes = nn.functional.normalize(self.means, dim=1)
        with adapters.base_only(self.base.network):
            return score_images(
                self.base, self.table, task, lambda x: (features_of(self.base, x) @ prototypes.T).argmax(dim=1)
            )

    def kept_bytes(self) -> int:
        """The means."""
        return _FLOAT * self.means.numel()


class PromptContender:
    """``l2p`` and ``dualprompt``: a frozen network with prompts that an image's own features choose, one linear head.

    The head grows and is trained as under ``linear``. The adapter slot is switched off throughout.

    Source: see ``prompts.py``.

    Args:
        base: The loaded network.
        prompts: The method's prompts.
    """

    def __init__(self, base: LoadedVit, prompts: PromptedVit) -> None:
        self.base = base
        self.prompts = prompts
        self.linear = LinearContender(base)

    def session(self, tasks: Sequence[ImageTask], config: Config) -> PromptSession:
        """Open tasks with the prompts ready for them."""
        self.prompts.begin()
        return PromptSession(self.linear.session(tasks, config), self.prompts)

    def learned(self) -> None:
        """Write the head's rows back; prompts were trained in place."""
        self.linear.learned()

    def evaluate(self, task: ImageTask) -> Score:
        """Score over all classes seen."""
        return score_images(self.base, self.linear.table, task, lambda x: self.scores(x).argmax(dim=1))

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """Return the logits of all classes seen for normalised images (B, 3, H, W), task unknown: (B, K)."""
        with bare(self.base):
            features, _ = self.prompts.prompted(images, self.prompts.query(images), training=False)
        return self.linear.head(features.float())

    def kept_bytes(self) -> int:
        """Prompts, keys and the head; the unused slot is nobody's."""
        return self.prompts.kept_bytes() + self.linear.head_bytes()


def _gaussian_bytes(gaussians: Iterable[Gaussian]) -> int:
    return _FLOAT * sum(one.mean.numel() + one.root.numel() for one in gaussians)


def _ridge(base: LoadedVit, config: Config) -> RidgeContender:
    assert config.head.width is not None and config.seed is not None
    return RidgeContender(base, config.head.width, config.seed)


def _l2p(base: LoadedVit, config: Config) -> PromptContender:
    assert config.seed is not None
    return PromptContender(base, L2P(base.trunk.vit, L2PSettings(), config.seed))


def _dualprompt(base: LoadedVit, config: Config) -> PromptContender:
    assert config.seed is not None
    settings = DualPromptSettings.of_depth(len(base.trunk.blocks))
    return PromptContender(base, DualPrompt(base.trunk.vit, settings, config.seed))


_HEADS: dict[str, Any] = {
    "linear": lambda base, _: LinearContender(base),
    "aligned": lambda base, _: AlignedContender(base),
    "routed": lambda base, _: RoutedContender(base),
    "ridge": _ridge,
    "mean": lambda base, _: MeanContender(base),
    "l2p": _l2p,
    "dualprompt": _dualprompt,
}


def make_contender(base: LoadedVit, head: str, config: Config) -> ContenderModel:
    """Return the network under a kind of head."""
    return cast("ContenderModel", _HEADS[head](base, config))
