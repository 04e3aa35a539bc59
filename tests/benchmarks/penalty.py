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
from typing import Any

import torch
from torch import Tensor
from treelora_backends.vit.shared_head import SharedHead, class_names, class_of_column, columns_of

from treelora_cli import Project
from treelora_cli.backend import adapters
from treelora_cli.heads.ridge import RidgeStatistics, ridge_share
from treelora_cli.learning.evaluation import read_held_out

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
    project = Project.open(sys.argv[1], device="cpu")
    limit = int(sys.argv[2]) if len(sys.argv) > 2 else None
    stored, config = project._stored, project._config()
    base: Any = project._loaded(config, exact=True)
    memory = stored.memory()
    head = SharedHead.restore(memory.shared(), base.trunk, config, base.runtime)
    features, spectrum = head.features, Spectrum(head._statistics(memory))
    assert features is not None
    names, class_of = class_names(columns_of(memory)), class_of_column(columns_of(memory))
    seen, truth = [], []
    for one in read_held_out(base, {name: stored.task_record(name) for name in project.tasks}, limit):
        data: Any = one.data
        truth += [names.index(data.labels[label]) for label in data.test.labels.tolist()]
        for pixels in data.test.pixels.split(128):
            images = base.preprocessing.normalise(pixels)
            with adapters.base_only(base.network), base.runtime.autocast():
                views = [features(base.trunk.after(base.trunk.before(view))) for view in (images, images.flip(-1))]
            seen.append(torch.stack(views).double().mean(dim=0))  # scores are linear: their mean is that of the mean
    phi, right = torch.cat(seen), torch.tensor(truth)
    print(f"{len(right)} images, {spectrum.total:.0f} views of {head.views}, width {len(spectrum.values)}")
    print("| `head.ridge` | accuracy | squared error | parameters | V views as V | as sqrt(V) | as one |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for multiple in _MULTIPLES:
        share = ridge_share(head.ridge * multiple, len(spectrum.values), spectrum.total)
        penalty = share * spectrum.scale
        weight, bias = spectrum.weight(penalty)
        columns = phi @ weight.T + bias
        scores = torch.full((len(columns), len(names)), -math.inf, dtype=torch.float64)
        scores.scatter_reduce_(1, class_of.expand(len(columns), -1), columns, "amax")
        correct = 100 * float((scores.argmax(dim=1) == right).double().mean())
        wanted = torch.nn.functional.one_hot(right, len(names))
        error = float((scores - wanted).square().sum(dim=1).mean())
        worths = (spectrum.total / head.views**power for power in (0.0, 0.5, 1.0))
        foretold = " | ".join(f"{spectrum.foretold(penalty, worth):.3f}" for worth in worths)
        fitted = spectrum.parameters(penalty)
        print(f"| {head.ridge * multiple:.3g} | {correct:.1f} | {error:.3f} | {fitted:.0f} | {foretold} |")


if __name__ == "__main__":
    main()
