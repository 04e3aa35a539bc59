"""Ridge classifiers for few examples: each left out once, in closed form, chooses the penalty and the sharpness.

Pure tensor code. Symbols: ``n`` examples, ``F`` feature width, ``K`` classes.

Source: the prediction sum of squares (Allen, Technometrics 1974) of ridge regression with a free intercept; an
example's residual without it is its residual with it, divided by one minus its leverage.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from treelora_cli.heads.ridge import LinearHead

_SHARES = tuple(10 ** (exponent / 2) for exponent in range(-8, 1))
"""Penalties tried, as shares of the mean eigenvalue that is not zero; beyond 1 all get the commonest class."""
_SHARPNESSES = tuple(2.0 ** (exponent / 2) for exponent in range(13))
"""Factors tried on scores before the softmax: 1 to 64."""
_WIDEST = 4096
"""Features kept where examples are as many; more are projected at random."""


@dataclass(frozen=True)
class LeaveOneOut:
    """A solved classifier and what leaving out each example said of it.

    Attributes:
        head: Scores near 1 for the right class and near 0 for others.
        sharpness: Factor on scores before the softmax under which the left-out examples are likeliest.
        share: The penalty, as a share of the mean eigenvalue that is not zero.
        scores: Of each example by the classifier solved without it, (n, K).
    """

    head: LinearHead
    sharpness: float
    share: float
    scores: Tensor

    def accuracy(self, labels: Tensor) -> float:
        """Return the share of examples that are classified right when left out; labels as in ``fit``."""
        return float((self.scores.argmax(dim=1) == labels).float().mean())

    @classmethod
    def fit(cls, features: Tensor, labels: Tensor, classes: int) -> LeaveOneOut:
        """Solve for features (n, F) and labels (n,) from 0, n 2 or more; features count by their deviation."""
        mean, deviation = features.mean(dim=0), features.std(dim=0)
        scale = deviation + 1e-2 * deviation.mean() + 1e-12
        x = (features - mean) / scale
        projection = None
        if min(x.shape) > _WIDEST:
            generator = torch.Generator().manual_seed(0)
            projection = torch.randn(x.shape[1], _WIDEST, generator=generator).to(x.device)
            x = x @ projection
        targets = nn.functional.one_hot(labels, classes).to(torch.float64)
        prior = targets.mean(dim=0)
        values, left, right = _decompose(x.double())
        turned = left.T @ (targets - prior)  # (R, K)
        best: tuple[float, float, Tensor, Tensor] | None = None
        for share in _SHARES:
            shrink = values / (values + share * values.mean())
            fitted = prior + left @ (shrink[:, None] * turned)
            leverage = 1 / len(x) + left.square() @ shrink
            scores = targets - (targets - fitted) / (1 - leverage).clamp(min=1e-6)[:, None]
            error = float((targets - scores).square().sum())
            if best is None or error < best[0]:
                best = error, share, shrink, scores
        assert best is not None
        _, share, shrink, scores = best
        weight = (right @ ((shrink / values.sqrt())[:, None] * turned)).float()  # (F, K)
        if projection is not None:
            weight = projection @ weight
        weight = (weight / scale[:, None]).T.contiguous()
        head = LinearHead(weight, prior.float() - weight @ mean)
        return cls(head, _likeliest_sharpness(scores, labels), share, scores.float())


def _decompose(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the eigenvalues above zero of ``x^T x``, (R,), and both sides' singular vectors, (n, R) and (F, R).

    Features that do not vary have none, and say nothing: what is left is the prior.
    """
    wide = x.shape[1] >= x.shape[0]
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    kept = values > 1e-10 * values.max().clamp(min=1e-12)
    values, vectors = values[kept].clamp(min=1e-12), vectors[:, kept]
    other = (x.T if wide else x) @ vectors / values.sqrt()
    return (values, vectors, other) if wide else (values, other, vectors)


def _likeliest_sharpness(scores: Tensor, labels: Tensor) -> float:
    losses = [float(nn.functional.cross_entropy(factor * scores, labels)) for factor in _SHARPNESSES]
    return float(_SHARPNESSES[losses.index(min(losses))])
