"""Tell an input's task from the frozen model; no example is kept.

Ridge regression onto task indicators, solved from sums that tasks add to in any order, each task weighing the
same. Features are standardised by the first task's and projected to a fixed width, so that what is stored
does not grow with the model.

Symbols: ``F`` feature width, ``W`` projected width, ``n`` examples, ``T`` tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from treelora_backends.causal_lm.batches import by_length, padded, tokens_at_once
from treelora_backends.causal_lm.network.halves import Passes
from treelora_backends.causal_lm.network.network import LmNetwork
from treelora_backends.causal_lm.render import Encoder
from treelora_cli.backend import adapters
from treelora_cli.backend.runtime import Runtime
from treelora_cli.backend.values import Memory
from treelora_cli.config import Config
from treelora_cli.data.examples import TextExample
from treelora_cli.heads.gram import Gram
from treelora_cli.heads.ridge import FeatureMap, RidgeStatistics

_CPU = torch.device("cpu")
_CACHED_BYTES = 64 * 1024**2
_RIDGE = 0.1
"""Ridge penalty, as a share of the mean eigenvalue."""
_OWN_SHARE = 0.01
"""Share of a task's own inputs, each left out, that may score below what is kept of it."""
_WAY_UP = 0.75
"""Where between an even guess and that score it is doubted that an input is its likeliest task's."""


@dataclass(frozen=True)
class Route:
    """The task an input is from.

    Attributes:
        task: Index of the likeliest task.
        probability: Its share of the scores of all tasks; ``None`` where nothing is chosen from.
        margin: How far it is ahead of the next task; ``None`` likewise.
        known: False where the input is from none of the tasks.
    """

    task: int
    probability: float | None = None
    margin: float | None = None
    known: bool = True


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
        self._earlier: list[Tensor] = []
        self._mean: Tensor
        self._floor: Tensor | None = None

    @classmethod
    def restore(cls, memory: Memory, config: Config) -> TaskRouter:
        """Rebuild the shared part from the project's memory."""
        router = cls(config)
        if memory.tasks:
            tensors = memory.shared()
            router.map = FeatureMap.from_tensors(tensors, router.width, router.seed, _CPU)
            router.gram = Gram.read(tensors, "route", router.width, _CPU)
            router._earlier = [task.tensors()["route.mean"] for task in memory.tasks]
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
        self._floor = self._own_floor(self._project(features), float(count), runtime)

    def _own_floor(self, projected: Tensor, count: float, runtime: Runtime) -> Tensor | None:
        """Return the score that the new task's inputs (n, W) reach when each is left out, between a guess, 0, and 1.

        ``None`` for a first task, which has nothing to be told from.
        """
        if not self._earlier:
            return None
        assert self.gram is not None
        means = torch.cat([*self._earlier, self._mean])
        own = left_out_scores(self.gram, means, projected, 1 / count)
        own = runtime.gather_rows(own[:, None].to(runtime.device))[:, 0].cpu()
        guess = 1 / len(means)
        return (own.quantile(_OWN_SHARE) - guess) / (1 - guess)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the part that all tasks share."""
        assert self.map is not None and self.gram is not None
        return {**self.map.to_tensors(), "route.half_gram": self.gram.half().clone()}

    def task_tensors(self) -> dict[str, Tensor]:
        """Return the new task's part."""
        floor = {} if self._floor is None else {"route.floor": self._floor}
        return {"route.mean": self._mean.cpu(), **floor}

    def scores(self, features: Tensor, memory: Memory) -> Tensor:
        """Return one score for each task, the likeliest the highest, (n, T)."""
        assert self.gram is not None
        means = torch.cat([task.tensors()["route.mean"] for task in memory.tasks])  # (T, W)
        alike = torch.ones(len(means))
        return RidgeStatistics(self.gram, means, alike).solve(_RIDGE)(self._project(features))

    def routes(self, scores: Tensor, memory: Memory) -> list[Route]:
        """Return where inputs with these scores (n, T) belong; scores of one input add up to about 1."""
        shares = scores.clamp(min=0, max=1)
        shares = shares / shares.sum(dim=1, keepdim=True).clamp(min=1e-6)
        highest = shares.topk(2, dim=1).values
        tasks = scores.argmax(dim=1)
        floors = self.thresholds(memory)
        known = [True] * len(tasks) if floors is None else (scores.amax(dim=1) >= floors[tasks]).tolist()
        margins = (highest[:, 0] - highest[:, 1]).tolist()
        return [Route(*one) for one in zip(tasks.tolist(), highest[:, 0].tolist(), margins, known, strict=True)]

    def folded(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """Return what ``scores`` computes as one linear map of features: weight (T, F) and bias (T,), float32."""
        assert self.map is not None and self.gram is not None
        means = torch.cat([task.tensors()["route.mean"] for task in memory.tasks])  # (T, W)
        head = RidgeStatistics(self.gram, means, torch.ones(len(means))).solve(_RIDGE)
        weight = (head.weight.double() @ self.map.projection.T.double()) / self.map.scale.double()
        bias = head.bias.double() - weight @ self.map.mean.double()
        return weight.float(), bias.float()

    @staticmethod
    def thresholds(memory: Memory) -> Tensor | None:
        """Return the score of each task, (T,), below which an input is not its own; a first one's is the others'."""
        found = [task.tensors().get("route.floor") for task in memory.tasks]
        told = [float(floor) for floor in found if floor is not None]
        if not told:
            return None  # learned by an older version
        guess = 1 / len(found)
        reached = torch.tensor([min(told) if floor is None else float(floor) for floor in found])
        return guess + _WAY_UP * reached.clamp(min=0, max=1) * (1 - guess)


def left_out_scores(gram: Gram, means: Tensor, rows: Tensor, weight: float) -> Tensor:
    """Return what the last task's own inputs score on it when each is left out in turn, (n,).

    Args:
        gram: Sum over tasks of their mean ``phi phi^T``, of width W.
        means: Mean input of each task, (T, W).
        rows: The last task's inputs, (n, W).
        weight: Of one of them in its task's mean, 1 / n.

    Source: the residual without an example is the one with it, divided by one minus its leverage (Allen, 1974).
    """
    tasks = len(means)
    middle = means.mean(dim=0).double()
    matrix = gram.dense().double() - tasks * torch.outer(middle, middle)
    matrix.diagonal().add_(_RIDGE * matrix.diagonal().mean())
    centred = rows.double() - middle
    turned = torch.linalg.solve(matrix, centred.T).T  # (n, W)
    scores = 1 / tasks + turned @ (means[-1].double() - middle)
    leverage = weight * (1 / tasks + (turned * centred).sum(dim=1))
    left_out: Tensor = (scores - leverage) / (1 - leverage).clamp(min=1e-6)
    return left_out.float()


def _summed(tensor: Tensor, runtime: Runtime) -> Tensor:
    """Sum a CPU tensor over processes, which talk through their devices."""
    return runtime.sum(tensor.to(runtime.device)).cpu()
