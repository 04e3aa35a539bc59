"""What penalty the shared head of a project should have: what its sums foretell, and what its held-out images say.

::

    python tests/benchmarks/penalty.py PROJECT [HELD_OUT_IMAGES_PER_CLASS]

For a project of the vit backend, whose held-out images should be in no table. One row for each multiple of
``head.ridge``: accuracy and squared error of the frozen network's head over all classes (an image and its mirror
image), effective parameters, and generalised cross-validation (Golub, Heath and Wahba 1979) where V views of an image
count as V, as sqrt(V) or as one.

Symbols: ``N`` views counted in, ``W`` features, ``K`` columns.
"""

from __future__ import annotations

import math
import sys

import torch
from charts import table
from frozen_head import FrozenHead
from torch import Tensor

from treelora_cli.heads.ridge import RidgeStatistics, ridge_share

_MULTIPLES = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)


class Spectrum:
    """The centred sums along the eigenvectors of the Gram matrix, for any penalty at once."""

    def __init__(self, statistics: RidgeStatistics) -> None:
        gram, sums, self.counts = (
            one.double() for one in (statistics.gram.dense(), statistics.sums, statistics.counts)
        )
        self.total = float(self.counts.sum())
        self.mean = sums.sum(dim=0) / self.total
        centred = gram - self.total * torch.outer(self.mean, self.mean)
        self.scale = float(centred.diagonal().mean())
        values, self.vectors = torch.linalg.eigh(centred)
        self.values = values.clamp(min=0)
        self.targets = (sums - self.counts[:, None] * self.mean) @ self.vectors  # (K, W)

    def weight(self, penalty: float) -> tuple[Tensor, Tensor]:
        """Return weight (K, W) and bias (K,)."""
        weight = (self.targets / (self.values + penalty)) @ self.vectors.T
        return weight, self.counts / self.total - weight @ self.mean

    def parameters(self, penalty: float) -> float:
        """Return how many features are in effect fitted, the constant included."""
        return 1 + float((self.values / (self.values + penalty)).sum())

    def foretold(self, penalty: float, worth: float) -> float:
        """Return the squared error of another image, where the N views are worth so many images."""
        explained = self.targets.square().sum(dim=0) * (self.values + 2 * penalty) / (self.values + penalty).square()
        residual = float((self.counts - self.counts.square() / self.total).sum() - explained.sum()) / self.total
        free = 1 - self.parameters(penalty) / worth
        return residual / free**2 if free > 0 else math.inf


@torch.no_grad()
def main() -> None:
    project = FrozenHead(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
    head, base, classes = project.head, project.base, len(project.names)
    spectrum = Spectrum(head._statistics(project.memory))
    seen = []
    for task in project.tasks:
        for pixels in task.test.pixels.split(128):
            views = project.views(base.preprocessing.normalise(pixels))
            seen.append(torch.stack(views).double().mean(dim=0))  # scores are linear: their mean is that of the mean
    phi, right = torch.cat(seen), torch.cat([project.truth(task) for task in project.tasks])
    wanted = torch.nn.functional.one_hot(right, classes)
    print(f"{len(right)} images, {spectrum.total:.0f} views of {head.views}, width {len(spectrum.values)}")
    rows = []
    for multiple in _MULTIPLES:
        share = ridge_share(head.ridge * multiple, len(spectrum.values), spectrum.total)
        penalty = share * spectrum.scale
        weight, bias = spectrum.weight(penalty)
        columns = phi @ weight.T + bias
        scores = torch.full((len(columns), classes), -math.inf, dtype=torch.float64)
        scores.scatter_reduce_(1, project.class_of.expand(len(columns), -1), columns, "amax")
        correct = 100 * float((scores.argmax(dim=1) == right).double().mean())
        error = float((scores - wanted).square().sum(dim=1).mean())
        foretold = [spectrum.foretold(penalty, spectrum.total / head.views**power) for power in (0.0, 0.5, 1.0)]
        figures = [f"{correct:.1f}", *(f"{one:.3f}" for one in (error, *foretold))]
        rows.append([f"{head.ridge * multiple:.3g}", *figures[:2], f"{spectrum.parameters(penalty):.0f}", *figures[2:]])
    heading = ["accuracy", "squared error", "parameters", "V views as V", "as sqrt(V)", "as one"]
    print(table(["`head.ridge`", *heading], rows))


if __name__ == "__main__":
    main()
