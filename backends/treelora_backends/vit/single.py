"""One set of weights with one linear head over all classes: the inferences ``latest`` and ``merged``.

``latest`` carries the newest adapter. ``merged`` is, by choice, the frozen network followed by solved blocks
(``solved.py``), or the mean of all tasks' updates. A network with updates changes with every task, while
older classes were measured on an older one. The change of the features is measured on the new task's
images, fitted by a linear map and applied to the older classes' statistics; the head is then solved anew
from the statistics of all classes.

Symbols: ``C`` width, ``K`` columns, ``n`` images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from treelora_backends.vit.shared_head import SharedHead, class_names, class_of_column, columns_of
from treelora_backends.vit.trunk import fill_classifier
from treelora_cli.backend import adapters
from treelora_cli.backend.adapters import AdapterWeights, mean_update
from treelora_cli.backend.values import Memory
from treelora_cli.heads.gaussians import ClassStatistics, fit_drift
from treelora_cli.heads.ridge import LinearHead

if TYPE_CHECKING:
    from treelora_backends.vit.loaded import LoadedVit

KINDS = ("latest", "merged")
COVARIANCE_RIDGE = 0.01
"""Share of the mean variance added to the common covariance."""
_DRIFT_IMAGES = 1024
"""Images on which the change of features is measured; a linear map needs no more."""


def updates_of(memory: Memory, kind: str) -> AdapterWeights:
    """Return the newest adapter, or one of higher rank that holds the mean of all tasks' updates."""
    if kind == "latest":
        return memory.tasks[-1].adapter()
    return mean_update([task.adapter() for task in memory.tasks])


def single_network_part(shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of the shared tensors that ``extended_statistics`` carries on; they are small."""
    return {key: value for key, value in shared.items() if key.partition(".")[0] in KINDS}


@dataclass(frozen=True)
class NewImages:
    """The new task's images, as the statistics need them.

    Attributes:
        pooled: Returns pooled features of some of this process's images by the network as it is, (n, C).
        labels: Their classes, (n,).
        classes: The task's number of classes.
        seed: The task's.
        known: The same of all images by the network with the task's adapter, (n, C), where it was computed before.
    """

    pooled: Callable[[Tensor], Tensor]
    labels: Tensor
    classes: int
    seed: int
    known: Tensor | None = None


def extended_statistics(
    base: LoadedVit,
    memory: Memory,
    new: NewImages,
    trained: AdapterWeights,
    carried: Mapping[str, Tensor],
    kinds: Sequence[str],
) -> dict[str, Tensor]:
    """Measure the new task on the networks of some kinds and carry older classes over; returns the shared tensors.

    Args:
        base: The loaded base.
        memory: The tasks before.
        new: The new task's images.
        trained: Its adapter.
        carried: What was returned for the tasks before.
        kinds: Which of ``KINDS`` are kept.
    """
    runtime = base.runtime
    everything = torch.arange(len(new.labels))
    generator = torch.Generator().manual_seed(new.seed)
    share = _DRIFT_IMAGES // runtime.accelerator.num_processes
    some = torch.randperm(len(everything), generator=generator)[: runtime.smallest(min(share, len(everything)))]
    tensors: dict[str, Tensor] = {}
    for kind in kinds:
        now = trained
        if kind == "merged":
            now = mean_update([*(task.adapter() for task in memory.tasks), trained])
        features = new.known if now is trained else None
        if features is None:
            features = _pooled_with(base, new, now, everything)
        fresh = ClassStatistics.measure(features, new.labels, new.classes, runtime)
        if memory.tasks:
            known = ClassStatistics.from_tensors(carried, kind, runtime.device)
            before = updates_of(memory, kind)
            if not before.equals(now):
                old = _pooled_with(base, new, before, some)
                drift = fit_drift(runtime.concatenate(old), runtime.concatenate(features[some]))
                known = known.moved(drift)
            fresh = known.joined(fresh)
        tensors |= fresh.to_tensors(kind)
    return tensors


def _pooled_with(base: LoadedVit, new: NewImages, weights: AdapterWeights, rows: Tensor) -> Tensor:
    """Pooled features of some of the new images with ``weights`` added to the base, (n, C)."""
    with adapters.added(base.network, weights):
        return new.pooled(rows)


def latest_head(base: LoadedVit, memory: Memory) -> tuple[list[str], LinearHead]:
    """Return the class names and the linear head that go with the newest adapter."""
    columns = columns_of(memory)
    names = class_names(columns)
    members = class_of_column(columns).to(base.runtime.device)
    return names, _carried_head(base, memory, "latest", members, len(names))


def _carried_head(base: LoadedVit, memory: Memory, kind: str, members: Tensor, classes: int) -> LinearHead:
    """Solve the head from statistics carried over to the present network; ``members`` is each column's class."""
    statistics = ClassStatistics.from_tensors(memory.shared(), kind, base.runtime.device)
    return statistics.by_class(members, classes).discriminant(COVARIANCE_RIDGE)


class SingleNetwork(nn.Module):
    """A stock timm network over all classes; what ``export --format merged`` saves."""

    def __init__(self, base: LoadedVit, memory: Memory, kind: str) -> None:
        super().__init__()
        columns = columns_of(memory)
        self.names = class_names(columns)
        self.vit = base.fresh_vit(len(self.names))
        members = class_of_column(columns).to(base.runtime.device)
        head = SharedHead.restore(memory.shared(), base.trunk, base.config, base.runtime) if kind == "merged" else None
        if head is not None and head.carries_blocks:
            head.grow_blocks(self.vit, memory, members, len(self.names))
        else:
            self._carry(base, memory, kind, members)
        self.eval()

    @torch.no_grad()
    def _carry(self, base: LoadedVit, memory: Memory, kind: str, members: Tensor) -> None:
        """Add the updates to the weights and solve the head from statistics carried over."""
        updates = updates_of(memory, kind)
        for index, layer in enumerate(updates.layers):
            weight = cast("nn.Linear", self.vit.get_submodule(layer)).weight
            weight += updates.update(index).to(weight.device)
        fill_classifier(self.vit, _carried_head(base, memory, kind, members, len(self.names)))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits over ``names``, (B, classes)."""
        return cast("Tensor", self.vit(images))
