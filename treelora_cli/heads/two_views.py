"""Heads that see an image twice, through the frozen network and through an adapted one, and whether that pays.

Pure tensor code. Symbols: ``F`` features of a view, ``W`` features of the head, ``n`` examples, ``K`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]

_SHARPNESSES = tuple(2.0 ** (exponent / 2) for exponent in range(13))
"""Factors tried on scores before the softmax: 1 to 64."""
SMALLEST_GAIN = 0.07
"""Nats by which an adapter must make an image kept out likelier, on average, and by no less than their standard error.
Openers of three kinds on the ViT-S gained 0.09 to 0.19, four on the embedded ViT -0.03 to 0.06."""


@dataclass(frozen=True)
class TwoViews:
    """Standardise both views side by side and project them: (n, 2F) -> (n, W), W = P + R.

    Attributes:
        mean, scale: Of the first task's features, (2F,).
        linear: Seeded normal, (2F, P); the features themselves would make a Gram matrix four times as large.
        random: Seeded normal, (2F, R), under a GELU.
    """

    mean: Tensor
    scale: Tensor
    linear: Tensor
    random: Tensor

    @classmethod
    def fit(cls, features: Tensor, widths: tuple[int, int], seed: int) -> TwoViews:
        """Make the map that standardises these features, (n, 2F), with P and R columns."""
        deviation = features.std(dim=0, unbiased=False)
        scale = deviation + 1e-3 * deviation.mean() + 1e-12
        return cls.of_moments(features.mean(dim=0), scale, widths, seed)

    @classmethod
    def of_moments(cls, mean: Tensor, scale: Tensor, widths: tuple[int, int], seed: int) -> TwoViews:
        """Make the map from what is stored of it."""
        generator = torch.Generator().manual_seed(seed)
        linear = torch.randn(len(mean), widths[0], generator=generator) / math.sqrt(widths[0])
        random = torch.randn(len(mean), widths[1], generator=generator) / math.sqrt(len(mean))
        return cls(mean, scale, linear.to(mean.device), random.to(mean.device))

    @property
    def width(self) -> int:
        """W."""
        return self.linear.shape[1] + self.random.shape[1]

    def __call__(self, features: Tensor) -> Tensor:
        """Expand (n, 2F) to (n, W)."""
        z = (features - self.mean) / self.scale
        return torch.cat([z @ self.linear, nn.functional.gelu(z @ self.random)], dim=1)

    def to_tensors(self) -> Tensors:
        """Return what cannot be drawn again from the seed."""
        return {"feature.mean": self.mean.cpu(), "feature.scale": self.scale.cpu()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], widths: tuple[int, int], seed: int, device: torch.device
    ) -> TwoViews:
        """Rebuild a map from ``to_tensors``, its widths and its seed."""
        return cls.of_moments(tensors["feature.mean"].to(device), tensors["feature.scale"].to(device), widths, seed)


@dataclass(frozen=True)
class Judgement:
    """What examples kept out of an adapter's training say of it.

    Attributes:
        gain: Nats by which the right class of an example is likelier with the adapter than without, on average.
        asked: Gain that was asked: one standard error, at least ``SMALLEST_GAIN``.
        sharpness: Factor on the adapted head's scores under which these examples are likeliest.
        count: Examples.
    """

    gain: float
    asked: float
    sharpness: float
    count: int

    @property
    def pays(self) -> bool:
        """Whether the adapter gains what was asked."""
        return self.gain >= self.asked


@dataclass(frozen=True)
class Examples:
    """Features of one head (n, W), labels from 0 (n,), and which were kept out of the adapter's training (n,)."""

    features: Tensor
    labels: Tensor
    kept_out: Tensor

    def scores(self, ridge: float, classes: int) -> Tensor:
        """Return scores of those kept out by ridge regression solved on the others, (m, K)."""
        seen, labels = self.features[~self.kept_out].double(), self.labels[~self.kept_out]
        mean = seen.mean(dim=0)
        centred = seen - mean
        penalty = ridge * float(centred.square().sum() / centred.shape[1])
        targets = nn.functional.one_hot(labels, classes).double()
        prior = targets.mean(dim=0)
        gram = centred @ centred.T
        gram.diagonal().add_(max(penalty, 1e-9))
        weight = centred.T @ torch.linalg.solve(gram, targets - prior)
        scores: Tensor = (self.features[self.kept_out].double() - mean) @ weight + prior
        return scores


def judge(frozen: Examples, adapted: Examples, ridges: tuple[float, float], classes: int) -> Judgement:
    """Compare a head on frozen features with one on both views, on examples that the adapter has not seen.

    Leave-one-out on the adapter's own training examples would be no estimate: it has seen their labels.

    Args:
        frozen: Examples under the head on frozen features; some, but not all, kept out.
        adapted: The same examples under the head on both views.
        ridges: Penalty of each, as a share of the mean eigenvalue.
        classes: K.
    """
    truth = frozen.labels[frozen.kept_out]
    before, _ = _likeliest(frozen.scores(ridges[0], classes), truth)
    after, sharpness = _likeliest(adapted.scores(ridges[1], classes), truth)
    gains = after - before
    error = float(gains.std()) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
    return Judgement(float(gains.mean()), max(error, SMALLEST_GAIN), sharpness, len(gains))


def _likeliest(scores: Tensor, truth: Tensor) -> tuple[Tensor, float]:
    """Return log-likelihoods (m,) under the sharpness that makes them largest, and that sharpness."""
    tried = [(-nn.functional.cross_entropy(f * scores, truth, reduction="none"), f) for f in _SHARPNESSES]
    return max(tried, key=lambda one: float(one[0].mean()))
