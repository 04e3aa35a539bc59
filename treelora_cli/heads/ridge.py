"""Classifiers solved from statistics instead of trained: no image is kept, nothing drifts.

Pure tensor code. Symbols: ``F`` feature width, ``W`` width of the random features, ``K`` columns (one per
task and class), ``n`` examples.

Source: random features with a ridge head follow RanPAC (McDonnell et al., NeurIPS 2023); the features here
come from several blocks, are standardised by the first task, and keep their linear part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from treelora_cli.heads.gram import Gram, NotPositiveError, solve_exactly

if TYPE_CHECKING:
    from treelora_cli.backend.runtime import Runtime

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class FeatureMap:
    """Standardise features and put random ones beside them: (n, F) -> (n, W), W = F + R.

    Attributes:
        mean, scale: Of the first task's features, (F,).
        projection: Seeded normal, (F, R).
    """

    mean: Tensor
    scale: Tensor
    projection: Tensor

    @classmethod
    def of_moments(cls, mean: Tensor, deviation: Tensor, random: int, seed: int) -> FeatureMap:
        """Make the map that standardises features of this mean and standard deviation, both (F,)."""
        scale = deviation + 1e-3 * deviation.mean() + 1e-12
        return cls(mean, scale, cls.draw(mean.shape[0], random, seed).to(mean.device))

    @classmethod
    def fit(cls, features: Tensor, random: int, seed: int, summed: Callable[[Tensor], Tensor]) -> FeatureMap:
        """Make the map that standardises all processes' features; ``summed`` adds up this one's, (n, F), and theirs."""
        count = summed(torch.tensor([float(len(features))], device=features.device))
        mean = summed(features.sum(dim=0)) / count
        variance = summed((features - mean).square().sum(dim=0)) / count
        return cls.of_moments(mean, variance.sqrt(), random, seed)

    @staticmethod
    def draw(width: int, random: int, seed: int) -> Tensor:
        """Draw the projection, (F, R); each column's expected squared norm is 1."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(width, random, generator=generator)
        return drawn / math.sqrt(width)

    @property
    def width(self) -> int:
        """Expanded width W."""
        return self.mean.shape[0] + self.projection.shape[1]

    def __call__(self, features: Tensor) -> Tensor:
        """Expand (n, F) to (n, W): the standardised features, and GELU of their projection."""
        z = (features - self.mean) / self.scale
        return torch.cat([z, nn.functional.gelu(z @ self.projection)], dim=1)

    def to_tensors(self) -> Tensors:
        """Return what cannot be drawn again from the seed."""
        return {"feature.mean": self.mean.cpu(), "feature.scale": self.scale.cpu()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], random: int, seed: int, device: torch.device) -> FeatureMap:
        """Rebuild a map from ``to_tensors`` and the seed."""
        mean = tensors["feature.mean"].to(device)
        return cls(mean, tensors["feature.scale"].to(device), cls.draw(mean.shape[0], random, seed).to(device))


@dataclass
class RidgeStatistics:
    """Sums from which ridge regression onto class indicators is solved exactly, in any order of arrival.

    Attributes:
        gram: Sum of ``phi phi^T``, of width W.
        sums: Sum of ``phi`` per column, (K, W).
        counts: Examples per column, weighted where they are, (K,).
    """

    gram: Gram
    sums: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, width: int, columns: int, device: torch.device, gram: Gram | None = None) -> RidgeStatistics:
        """Return statistics of nothing, or of no column yet but with ``gram`` to add to."""
        return cls(
            Gram.zeros(width, device) if gram is None else gram,
            torch.zeros(columns, width, device=device),
            torch.zeros(columns, device=device),
        )

    def add(self, phi: Tensor, columns: Tensor, weights: Tensor | None = None) -> None:
        """Count examples in: phi (n, W), column index of each (n,), and what each counts (n,), by default 1."""
        if weights is not None:
            self.gram.add_(phi * weights.sqrt()[:, None])
            self.sums.index_add_(0, columns, phi * weights[:, None])
            self.counts.index_add_(0, columns, weights.to(self.counts.dtype))
            return
        self.gram.add_(phi)
        self.sums.index_add_(0, columns, phi)
        self.counts.index_add_(0, columns, torch.ones_like(columns, dtype=self.counts.dtype))

    def over_processes(self, gram: Gram | None, runtime: Runtime) -> RidgeStatistics:
        """Return the sum over processes, and over what came before: ``gram``, unless it was added to in place."""
        total = runtime.sum(self.gram.values)
        if gram is not None and self.gram is not gram:
            total = total.add_(gram.values)
        return RidgeStatistics(self.gram.like(total), runtime.sum(self.sums), runtime.sum(self.counts))

    def solve(self, ridge: float) -> LinearHead:
        """Solve centred ridge regression with all classes weighted alike in prior but not in error.

        Args:
            ridge: Penalty as a share of the mean eigenvalue of the centred Gram matrix.

        Returns:
            A head with scores near 1 for the right column and near 0 for others.
        """
        own = RidgeStatistics(self.gram.like(self.gram.values.clone()), self.sums, self.counts)
        return own.solve_(ridge, lambda: self.gram)

    def solve_(self, ridge: float, again: Callable[[], Gram]) -> LinearHead:
        """As ``solve``, but in the place of the Gram matrix, which is overwritten.

        Args:
            ridge: As for ``solve``.
            again: Returns the Gram matrix as it was; asked only where single precision does not do.
        """
        total = self.counts.sum()
        mean = self.sums.sum(dim=0) / total
        targets = (self.sums - self.counts[:, None] * mean).T.contiguous()
        penalty = _centre_(self.gram, mean, float(total), max(ridge, _SMALLEST_RIDGE))
        try:
            weight = self.gram.solve_(targets)
        except NotPositiveError:
            matrix = again().dense().double().addr_(mean.double(), mean.double(), alpha=-float(total))
            matrix.diagonal().add_(penalty)
            weight = solve_exactly(matrix, targets)
        weight = weight.T.contiguous()
        return LinearHead(weight, self.counts / total - weight @ mean)


_SMALLEST_RIDGE = 1e-6


def _centre_(gram: Gram, mean: Tensor, total: float, ridge: float) -> float:
    """Take the mean's part out of a Gram matrix, and add the penalty to its diagonal; returns the penalty."""
    gram.add_(mean[None], -total)
    penalty = ridge * max(float(gram.diagonal().mean()), 1e-12)
    gram.add_diagonal_(penalty)
    return penalty


_SHARE_EXPONENT = 2.5
_LARGEST_SHARE = 10.0


def ridge_share(ridge: float, width: int, examples: float, views: int = 1) -> float:
    """Return the penalty for ``RidgeStatistics.solve``: what fits many examples starves on few.

    The best share of the mean eigenvalue was found to grow with a power of features per example (measured from 0.15 to
    12 features per example); it is held below 10. Views of one image say less than as many images: V of them count as
    sqrt(V), with which generalised cross-validation foretells the error on other images (recipes/RESULTS_APPENDIX.md).

    Args:
        ridge: Share at one feature per example.
        width: Features W.
        examples: Examples counted in, each view as one.
        views: V, of each image.
    """
    worth = max(examples / math.sqrt(views), 1.0)
    return min(_LARGEST_SHARE, ridge * math.pow(width / worth, _SHARE_EXPONENT))


@dataclass(frozen=True)
class LinearHead:
    """Scores ``phi @ weight.T + bias``: weight (K, W), bias (K,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, phi: Tensor) -> Tensor:
        """Return scores, (n, K)."""
        return phi @ self.weight.T + self.bias
