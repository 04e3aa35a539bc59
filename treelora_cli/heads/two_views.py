"""Answers of a head that sees an image twice, frozen and adapted, beside a frozen head's, and whether that pays.

Pure tensor code. Symbols: ``W`` features of a head, ``n`` examples, ``K`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FROZEN_SHARE = 0.5
"""Weight of the frozen head's log-probabilities beside those of the head that sees both views (recipes/RESULTS.md)."""
LEAST_SHARP, MOST_SHARP = 8.0, 16.0
"""Bounds of the factor on that head's scores before the softmax, for answers; few images kept out fit it badly."""
_SHARPNESSES = tuple(2.0 ** (exponent / 2) for exponent in range(13))
"""Factors tried on scores: 1 to 64."""


def fused(scores: Tensor, sharpness: float, frozen: Tensor) -> Tensor:
    """Return log-probabilities of both heads multiplied, (n, K).

    Args:
        scores: Of the head that sees both views, (n, K).
        sharpness: Factor on them.
        frozen: Log-probabilities of the frozen head, (n, K).
    """
    return ((sharpness * scores).log_softmax(dim=1) + FROZEN_SHARE * frozen).log_softmax(dim=1)


@dataclass(frozen=True)
class Judgement:
    """What examples kept out of an adapter's training say of it.

    Attributes:
        gain: Nats by which the right class of an example is likelier with the adapter than without, on average.
        asked: Gain that was asked: no loss beyond one standard error. A task's own classes say too little of what its
            adapter does for those to come: openers that gained 0.00 to 0.05 nats gave the next nine tasks 0.10 to 0.16
            (recipes/RESULTS.md).
        sharpness: Factor on the scores of the head on both views under which these examples are likeliest,
            within its bounds.
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
    """Compare a head on frozen features with both heads, on examples that the adapter has not seen.

    Leave-one-out on the adapter's own training examples would be no estimate: it has seen their labels.

    Args:
        frozen: Examples under the head on frozen features; some, but not all, kept out.
        adapted: The same examples under the head on both views.
        ridges: Penalty of each, as a share of the mean eigenvalue.
        classes: K.
    """
    truth = frozen.labels[frozen.kept_out]
    plain, both = frozen.scores(ridges[0], classes), adapted.scores(ridges[1], classes)
    before = max(((factor * plain).log_softmax(dim=1) for factor in _SHARPNESSES), key=_likelihood(truth))
    tried = [(fused(both, factor, before), factor) for factor in _SHARPNESSES]
    after, sharpness = max(tried, key=lambda one: _likelihood(truth)(one[0]))
    gains = (after - before).gather(1, truth[:, None]).squeeze(1)
    error = float(gains.std()) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
    sharpness = min(max(sharpness, LEAST_SHARP), MOST_SHARP)
    return Judgement(float(gains.mean()), -error if math.isfinite(error) else error, sharpness, len(gains))


def _likelihood(truth: Tensor) -> Callable[[Tensor], float]:
    """Return what tells the mean log-likelihood of the right classes (n,) from log-probabilities (n, K)."""
    return lambda logs: -float(nn.functional.nll_loss(logs, truth))
