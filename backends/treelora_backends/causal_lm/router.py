"""Tell an input's task from the frozen model; no example is kept.

Ridge regression onto task indicators, solved from sums that tasks add to in any order, each task weighing the
same. Features are standardised by the first task's and projected to a fixed width, so that what is stored
does not grow with the model.

Symbols: ``F`` feature width, ``W`` projected width, ``n`` examples, ``T`` tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from treelora_backends.causal_lm.batches import by_length, padded, tokens_at_once
from treelora_backends.causal_lm.network.halves import Passes
from treelora_backends.causal_lm.network.network import LmNetwork
from treelora_backends.causal_lm.render import Encoder
from treelora_cli.backend import adapters
from treelora_cli.backend.contract import Memory
from treelora_cli.backend.runtime import Runtime
from treelora_cli.config import Config
from treelora_cli.data.examples import TextExample
from treelora_cli.heads.gram import Gram
from treelora_cli.heads.ridge import FeatureMap, RidgeStatistics

_CPU = torch.device("cpu")
_CACHED_BYTES = 64 * 1024**2
_RIDGE = 0.1
"""Ridge penalty, as a share of the mean eigenvalue."""


class FeatureReader:
    """Reads frozen features of inputs, and remembers them: held-out examples are asked for after every task."""

    def __init__(self, wrapped: nn.Module, lm: LmNetwork, encoder: Encoder, runtime: Runtime) -> None:
        self.wrapped = wrapped
        self.lm = lm
        self.encoder = encoder
        self.runtime = runtime
        self._known: dict[tuple[str, str], Tensor] = {}

    def __call__(self, examples: Sequence[TextExample], description: str) -> Tensor:
        """Return the features of each input, (n, F), on the CPU."""
        precision = self.runtime.forward_precision
        wanted = list(dict.fromkeys(one.content for one in examples))
        found = {content: self._known[precision, content] for content in wanted if (precision, content) in self._known}
        fresh = [content for content in wanted if content not in found]
        ids = [self.encoder.content_ids(content) for content in fresh]
        batches = list(by_length(ids, len, tokens_at_once(self.lm.device)))
        self.wrapped.eval()
        passes = Passes(self.runtime, self.lm.first_blocks(self.lm.feature_block + 1))
        with adapters.base_only(self.wrapped):
            for rows in self.runtime.reporter.track(batches, description, len(batches)):
                batch = padded([ids[row] for row in rows], self.encoder, self.lm.device)
                with passes.without_gradients():
                    features = self.lm.read(batch).features(batch.lengths).cpu()
                found |= {fresh[row]: feature for row, feature in zip(rows, features, strict=True)}
        self._remember(precision, found)
        return torch.stack([found[one.content] for one in examples])

    def _remember(self, precision: str, found: dict[str, Tensor]) -> None:
        for content, feature in found.items():
            if len(self._known) * feature.numel() * feature.element_size() < _CACHED_BYTES:
                self._known[precision, content] = feature.clone()


class TaskRouter:
    """The classifier over all tasks learned so far; it is small and stays on the CPU."""

    def __init__(self, config: Config) -> None:
        assert config.head.width is not None and config.seed is not None
        self.width: int = config.head.width
        self.seed: int = config.seed
        self.map: FeatureMap | None = None
        self.gram: Gram | None = None
        self._mean: Tensor

    @classmethod
    def restore(cls, memory: Memory, config: Config) -> TaskRouter:
        """Rebuild the shared part from the project's memory."""
        router = cls(config)
        if memory.tasks:
            tensors = memory.shared()
            router.map = FeatureMap.from_tensors(tensors, router.width, router.seed, _CPU)
            router.gram = Gram.read(tensors, "route", router.width, _CPU)
        return router

    def _project(self, features: Tensor) -> Tensor:
        """Standardise and project: (n, F) -> (n, W)."""
        assert self.map is not None
        return ((features - self.map.mean) / self.map.scale) @ self.map.projection

    def add_task(self, features: Tensor, runtime: Runtime) -> None:
        """Add this process's features of a task, (n, F)."""
        if self.map is None:
            self.map = FeatureMap.fit(features, self.width, self.seed, lambda part: _summed(part, runtime))
        fresh = RidgeStatistics.empty(self.width, 1, _CPU)
        fresh.add(self._project(features), torch.zeros(len(features), dtype=torch.int64))
        count = _summed(fresh.counts, runtime)
        values = _summed(fresh.gram.values, runtime) / count
        self._mean = _summed(fresh.sums, runtime) / count
        self.gram = fresh.gram.like(values if self.gram is None else self.gram.values + values)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the part that all tasks share."""
        assert self.map is not None and self.gram is not None
        return {**self.map.to_tensors(), "route.half_gram": self.gram.half().clone()}

    def task_tensors(self) -> dict[str, Tensor]:
        """Return the new task's part."""
        return {"route.mean": self._mean.cpu()}

    def scores(self, features: Tensor, memory: Memory) -> Tensor:
        """Return one score for each task, the likeliest the highest, (n, T)."""
        assert self.gram is not None
        means = torch.cat([task.tensors()["route.mean"] for task in memory.tasks])  # (T, W)
        alike = torch.ones(len(means))
        return RidgeStatistics(self.gram, means, alike).solve(_RIDGE)(self._project(features))


def _summed(tensor: Tensor, runtime: Runtime) -> Tensor:
    """Sum a CPU tensor over processes, which talk through their devices."""
    return runtime.sum(tensor.to(runtime.device)).cpu()
