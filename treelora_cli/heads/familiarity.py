"""Whether an image is of a kind that was ever learned: by the direction and the distance of its nearest class.

Both in coordinates in which the covariance inside classes is the identity. The cosine to a class mean, seen from the
mean of all data, tells foreign images of like kind; the distance those of another kind, which lie farther out.

Pure tensor code. Symbols: ``C`` feature width, ``K`` columns (one per task and class), ``n`` images.

Source: class means and shared covariance of Lee et al. (2018, arXiv:1807.03888). What it was chosen from is in
``recipes/RESULTS.md``, "Images of no learned class".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_SHRINKAGE = 0.3
"""Added to the covariance's diagonal, as a share of its mean."""
_DISTANCE = 0.1
"""What the squared distance to the nearest class, per feature, takes from the cosine; for own images it is near 1."""


@dataclass(frozen=True)
class Familiarity:
    """What classes look like in some features.

    Attributes:
        within: Lower Cholesky factor of the covariance inside classes, (C, C).
        mean: Of all data, (C,).
        classes: Mean of each column that has images, from there, whitened, (K, C).
    """

    within: Tensor
    mean: Tensor
    classes: Tensor

    @classmethod
    def of_sums(cls, gram: Tensor, sums: Tensor, counts: Tensor) -> Familiarity:
        """Make it of sums over images: ``phi phi^T`` (C, C), ``phi`` of each column (K, C), and their numbers (K,)."""
        gram, sums, counts = gram.double(), sums.double(), counts.double()
        total = counts.sum()
        means = sums / counts.clamp(min=1)[:, None]
        mean = sums.sum(dim=0) / total
        within = _factor((gram - means.T @ sums) / total)
        return cls(within, mean, _whitened(within, (means - mean)[counts > 0]))

    def __call__(self, features: Tensor) -> Tensor:
        """Return how familiar images are, (n,), 1 at most: higher is more; features (n, C)."""
        centred = _whitened(self.within, features.double() - self.mean)
        cosine = (_unit(centred) @ _unit(self.classes).T).amax(dim=1)  # 0 with a single class, which is the mean
        distance = torch.cdist(centred, self.classes).square().amin(dim=1) / centred.shape[1]
        return (cosine - _DISTANCE * distance).float()


def _unit(rows: Tensor) -> Tensor:
    """Return rows (n, C) of length 1; one of length 0 stays."""
    return nn.functional.normalize(rows, dim=1)


def _factor(covariance: Tensor, shrinkage: float = _SHRINKAGE) -> Tensor:
    """Return the lower Cholesky factor of a covariance, shrunk towards a multiple of the identity."""
    shrunk = covariance.clone()
    shrunk.diagonal().add_(shrinkage * covariance.diagonal().mean().clamp(min=1e-12))
    factor: Tensor = torch.linalg.cholesky(shrunk)
    return factor


def _whitened(factor: Tensor, rows: Tensor) -> Tensor:
    """Return rows (n, C) in coordinates in which the covariance is the identity."""
    solved: Tensor = torch.linalg.solve_triangular(factor, rows.T, upper=False)
    return solved.T.contiguous()
