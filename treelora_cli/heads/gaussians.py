"""What contenders keep of classes instead of examples: means, Gaussians, random features under ridge regression.

Pure tensor code. Symbols: ``n`` examples, ``C`` feature width, ``K`` classes, ``W`` random features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from treelora_cli.heads.ridge import LinearHead, Tensors

if TYPE_CHECKING:
    from treelora_cli.backend.runtime import Runtime

_JITTER = 1e-4
"""Added to a covariance's diagonal, as SLCA's code does; relative to the mean variance where that is larger than 1."""
_PENALTIES = tuple(10.0**power for power in range(-8, 9))
"""RanPAC's candidates for the ridge penalty."""


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the mean feature of each class, (K, C), of features (n, C) with labels (n,)."""
    sums = torch.zeros(classes, features.shape[1], device=features.device).index_add_(0, labels, features)
    return sums / torch.bincount(labels, minlength=classes).clamp(min=1)[:, None]


# -- Gaussians -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gaussian:
    """A class as a normal distribution.

    Attributes:
        mean: (C,).
        root: Lower Cholesky factor of the covariance, (C, C).
    """

    mean: Tensor
    root: Tensor

    @classmethod
    def measure(cls, features: Tensor) -> Gaussian:
        """Summarise one class's features (n, C); of a single example only the jitter is its covariance."""
        mean = features.mean(dim=0)
        deviation = (features - mean).double()
        return cls(mean, covariance_root(deviation.T @ deviation / max(1, len(features) - 1)))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw features, (count, C); the generator is on the CPU, so that devices agree."""
        noise = torch.randn(count, len(self.mean), generator=generator).to(self.mean.device)
        return self.mean + noise @ self.root.T


def covariance_root(covariance: Tensor) -> Tensor:
    """Return the lower Cholesky factor of a float64 covariance (C, C) plus jitter, in float32."""
    jittered = covariance.clone()
    jittered.diagonal().add_(_JITTER * max(1.0, float(covariance.diagonal().mean())))
    factor: Tensor = torch.linalg.cholesky(jittered)
    return factor.float()


@dataclass(frozen=True)
class AlignSettings:
    """How a linear head is trained on samples of Gaussians.

    Attributes:
        epochs: Passes; in each every class is drawn ``samples`` times.
        samples: Examples drawn of each class, and in a mini-batch.
        lr: Adam's peak rate, falling to 0 as a cosine.
        logit_scale: SLCA's temperature on logits divided by their norm; ``None`` leaves them alone.
    """

    epochs: int
    samples: int = 256
    lr: float = 0.01
    logit_scale: float | None = None


def align(
    head: LinearHead,
    gaussians: Sequence[Gaussian],
    targets: Sequence[int],
    settings: AlignSettings,
    seed: int,
    group: Tensor | None = None,
) -> LinearHead:
    """Train a linear head on samples of all classes seen.

    Both sources use stochastic gradient descent with a rate tuned to ViT-B/16's features; here it is Adam on
    features standardised by the Gaussians themselves, which folds back into a head on the features as they are.

    Args:
        head: Where to start, on features as they are.
        gaussians: One or more for each class.
        targets: Class of each Gaussian.
        settings: Epochs, rate and loss.
        seed: Of the samples and their order.
        group: Task of each class, (K,); needed with ``logit_scale``.

    Source: SLCA (Zhang et al., ICCV 2023), classifier alignment; HiDe-Prompt (Wang et al., NeurIPS 2023), the
    losses of task-identity inference and task-adaptive prediction: cross-entropy over all classes on samples of the
    classes' Gaussians.
    """
    centre = torch.stack([one.mean for one in gaussians]).mean(dim=0)
    variance = torch.stack([one.root.square().sum(dim=1) + (one.mean - centre).square() for one in gaussians])
    deviation = variance.mean(dim=0).sqrt()
    weight = nn.Parameter(head.weight * deviation)
    bias = nn.Parameter(head.bias + head.weight @ centre)
    optimizer = torch.optim.Adam([weight, bias], lr=settings.lr)
    steps = max(1, settings.epochs * len(gaussians))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for x, y in _sampled(gaussians, targets, settings, generator):
        logits = (x - centre) / deviation @ weight.T + bias
        if settings.logit_scale is not None:
            assert group is not None
            logits = normalised_logits(logits, group) / settings.logit_scale
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(logits, y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    solved = weight.detach() / deviation
    return LinearHead(solved, bias.detach() - solved @ centre)


def _sampled(
    gaussians: Sequence[Gaussian], targets: Sequence[int], settings: AlignSettings, generator: torch.Generator
) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield shuffled mini-batches of samples with their classes, all epochs."""
    device = gaussians[0].mean.device
    labels = torch.tensor(targets, device=device).repeat_interleave(settings.samples)
    for _ in range(settings.epochs):
        drawn = torch.cat([one.sample(settings.samples, generator) for one in gaussians])
        order = torch.randperm(len(drawn), generator=generator).to(device)
        for rows in torch.split(order, settings.samples):
            yield drawn[rows], labels[rows]


def normalised_logits(logits: Tensor, group: Tensor) -> Tensor:
    """Return logits (B, K) divided by the mean over tasks of their norm within the task.

    Source: SLCA (Zhang et al., ICCV 2023), the normalised loss of classifier alignment.
    """
    norms = [logits[:, group == one].norm(dim=1) + 1e-7 for one in torch.unique(group)]
    return logits / torch.stack(norms, dim=1).mean(dim=1, keepdim=True)


# -- random features -------------------------------------------------------------------------------


class RandomRidge:
    """Ridge regression on ``relu(features @ projection)``, from sums over all tasks.

    Args:
        features: Feature width C.
        width: Random features W.
        seed: Of the projection.
        device: Where the sums are.

    Source: RanPAC (McDonnell et al., NeurIPS 2023), algorithm 1.
    """

    def __init__(self, features: int, width: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.projection = torch.randn(features, width, generator=generator).to(device)
        self.gram = torch.zeros(width, width, device=device)
        self.sums = torch.zeros(0, width, device=device)
        self.penalty = 1.0

    def expand(self, features: Tensor) -> Tensor:
        """Return random features, (n, C) -> (n, W)."""
        return torch.relu(features @ self.projection)

    def add(self, features: Tensor, classes: Tensor, count: int) -> None:
        """Count a task's examples in, (n, C) of classes (n,) below ``count``, and choose the penalty on them."""
        expanded = self.expand(features)
        targets = nn.functional.one_hot(classes, count).float()
        self.penalty = best_penalty(expanded, targets)
        self.sums = torch.cat([self.sums, self.sums.new_zeros(count - len(self.sums), self.sums.shape[1])])
        self.sums += targets.T @ expanded
        self.gram.addmm_(expanded.T, expanded)

    def solve(self) -> Tensor:
        """Return the weights ``(G + penalty I)^-1 C``, (K, W)."""
        system = self.gram.clone()
        system.diagonal().add_(self.penalty)
        factor, failed = torch.linalg.cholesky_ex(system)
        if bool(failed):
            exact: Tensor = torch.linalg.solve(system.double(), self.sums.T.double())
            return exact.T.float()
        weight = torch.cholesky_solve(self.sums.T, factor)
        # one refinement step: float32 loses digits where the penalty is small beside the Gram matrix
        return (weight + torch.cholesky_solve(self.sums.T - system @ weight, factor)).T


def best_penalty(expanded: Tensor, targets: Tensor) -> float:
    """Return the penalty under which examples left out, one at a time, have the least squared error.

    RanPAC holds a fifth of the examples out instead; of few images a class that says less (recipes/RESULTS.md).
    All candidates share one decomposition of the examples' (or features') Gram matrix, whichever is smaller.

    Args:
        expanded: (n, W), n 2 or more; with fewer the penalty is 1.
        targets: One row of class indicators for each, (n, K).
    """
    if len(expanded) < 2:
        return 1.0
    x, y = expanded.double(), targets.double()
    if len(x) <= x.shape[1]:
        values, left = torch.linalg.eigh(x @ x.T)  # left spans all: nothing lies beside it
        right = left.T @ y
        beside, beside_share = torch.zeros_like(y), torch.zeros_like(y[:, 0])
    else:
        values, vectors = torch.linalg.eigh(x.T @ x)
        real = values > 1e-12 * values.max()  # features that repeat others add directions of nothing
        values, left = values[real], (x @ vectors[:, real]) / values[real].sqrt()
        right = left.T @ y
        beside, beside_share = y - left @ right, 1 - left.square().sum(dim=1)
    values = values.clamp(min=0)

    def left_out(penalty: float) -> float:
        kept = penalty / (values + penalty)  # by this factor a direction's residual is what its target was
        residual = beside + left @ (kept[:, None] * right)
        return float((residual / (beside_share + left.square() @ kept)[:, None]).square().mean())

    errors = [left_out(one) for one in _PENALTIES]
    return _PENALTIES[errors.index(min(errors))]


@dataclass(frozen=True)
class Drift:
    """How a change of the network moves its features: ``x -> (x - before) @ map + after``.

    Attributes:
        before, after: Mean features under the old and the new network, (C,).
        map: (C, C).
    """

    before: Tensor
    after: Tensor
    map: Tensor


def fit_drift(old: Tensor, new: Tensor, ridge: float = 0.1) -> Drift:
    """Fit features of the same images under two networks, both (n, C); towards identity where data is thin.

    Args:
        old: Features under the old network.
        new: Features under the new network.
        ridge: Pull of the map towards identity, as a share of the mean feature variance.
    """
    before, after = old.mean(dim=0), new.mean(dim=0)
    x, change = (old - before).double(), (new - after - (old - before)).double()
    gram = x.T @ x
    gram.diagonal().add_(max(ridge, 1e-6) * gram.diagonal().mean().clamp(min=1e-12))
    moved = torch.linalg.solve(gram, x.T @ change).float()
    return Drift(before, after, torch.eye(old.shape[1], device=old.device) + moved)


@dataclass(frozen=True)
class ClassStatistics:
    """Gaussian summary of classes with one common covariance.

    Attributes:
        means: (K, C).
        counts: (K,).
        scatter: Sum over examples of the outer product of deviations from their class mean, (C, C).
    """

    means: Tensor
    counts: Tensor
    scatter: Tensor

    @classmethod
    def measure(cls, features: Tensor, labels: Tensor, classes: int, runtime: Runtime) -> ClassStatistics:
        """Summarise features (n, C) with labels (n,), over all processes."""
        sums = torch.zeros(classes, features.shape[1], device=features.device).index_add_(0, labels, features)
        counts = torch.bincount(labels, minlength=classes).float()
        sums, counts = runtime.sum(sums), runtime.sum(counts)
        means = sums / counts.clamp(min=1)[:, None]
        deviations = features - means[labels]
        return cls(means, counts, runtime.sum(deviations.T @ deviations))

    def moved(self, drift: Drift) -> ClassStatistics:
        """Return the statistics as the changed network would have given them."""
        means = (self.means - drift.before) @ drift.map + drift.after
        return ClassStatistics(means, self.counts, drift.map.T @ self.scatter @ drift.map)

    def joined(self, other: ClassStatistics) -> ClassStatistics:
        """Append another task's columns."""
        return ClassStatistics(
            torch.cat([self.means, other.means]),
            torch.cat([self.counts, other.counts]),
            self.scatter + other.scatter,
        )

    def by_class(self, class_of: Tensor, classes: int) -> ClassStatistics:
        """Pool columns of the same class: class index of each column (K,)."""
        counts = torch.zeros(classes, device=self.counts.device).index_add_(0, class_of, self.counts)
        sums = torch.zeros(classes, self.means.shape[1], device=self.means.device)
        means = sums.index_add_(0, class_of, self.means * self.counts[:, None]) / counts.clamp(min=1)[:, None]
        between = self.means - means[class_of]
        return ClassStatistics(means, counts, self.scatter + (between * self.counts[:, None]).T @ between)

    def discriminant(self, ridge: float) -> LinearHead:
        """Return Fisher's linear discriminant with equal class priors; logits are log-densities up to a constant."""
        covariance = (self.scatter / self.counts.sum()).double()
        covariance.diagonal().add_(max(ridge, 1e-6) * covariance.diagonal().mean().clamp(min=1e-12))
        weight = torch.linalg.solve(covariance, self.means.double().T).T
        bias = -0.5 * (weight * self.means.double()).sum(dim=1)
        return LinearHead(weight.float(), bias.float())

    def to_tensors(self, prefix: str) -> Tensors:
        """Return the tensors under ``prefix``."""
        return {
            f"{prefix}.means": self.means.cpu().contiguous(),
            f"{prefix}.counts": self.counts.cpu().contiguous(),
            f"{prefix}.scatter": self.scatter.cpu().contiguous(),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str, device: torch.device) -> ClassStatistics:
        """Read what ``to_tensors`` returned."""
        return cls(*(tensors[f"{prefix}.{name}"].to(device) for name in ("means", "counts", "scatter")))
