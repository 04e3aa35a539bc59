"""A closed set of answers, chosen by a head that is solved instead of trained.

The pass that tells inputs apart reads states of several frozen blocks. A ridge classifier on them answers without the
adapter and without another pass; it costs no training step and cannot be forgotten.

Symbols: ``n`` inputs, ``F`` features, ``K`` answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treelora_cli.backend.runtime import Runtime
from treelora_cli.heads.leave_one_out import LeaveOneOut
from treelora_cli.heads.ridge import LinearHead

_PREFIX = "closed"
_FEWEST = 8
"""Examples; fewer say nothing of how well they tell."""


@dataclass(frozen=True)
class ClosedHead:
    """Chooses one of a task's answers.

    Attributes:
        head: On frozen features.
        sharpness: Factor on its scores before the softmax.
    """

    head: LinearHead
    sharpness: float

    @classmethod
    def fit(
        cls, features: Tensor, answers: Sequence[str], labels: Sequence[str], runtime: Runtime
    ) -> ClosedHead | None:
        """Solve for this process's and the others' examples: features (n, F) and the answer of each.

        Returns:
            ``None`` where frozen states do not tell the answers: examples left out are answered no better than by
            giving the commonest each time, or by less than a standard error. The adapter answers then.
        """
        places = torch.tensor([labels.index(answer) for answer in answers])
        everything = runtime.gather_rows(torch.cat([features, places[:, None].to(features)], dim=1).to(runtime.device))
        seen, right = everything[:, :-1].cpu(), everything[:, -1].long().cpu()
        if len(seen) < _FEWEST:
            return None
        fitted = LeaveOneOut.fit(seen, right, len(labels))
        commonest = float(right.bincount().max()) / len(right)
        clearly = commonest + math.sqrt(commonest * (1 - commonest) / len(right))
        return cls(fitted.head, fitted.sharpness) if fitted.accuracy(right) > clearly else None

    def __call__(self, features: Tensor) -> tuple[list[int], list[float]]:
        """Return the place of each input's answer, and its probability."""
        confidence, best = (self.sharpness * self.head(features)).softmax(dim=1).max(dim=1)
        return best.tolist(), confidence.tolist()

    def likely(self, features: Tensor, count: int) -> list[list[tuple[int, float]]]:
        """Return the places of each input's ``count`` likeliest answers with their probabilities, likeliest first."""
        chances = (self.sharpness * self.head(features)).softmax(dim=1)
        best = chances.topk(min(count, chances.shape[1]), dim=1)
        return [list(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    def to_tensors(self) -> dict[str, Tensor]:
        """Return what is kept."""
        parts = {"weight": self.head.weight, "bias": self.head.bias, "sharpness": torch.tensor(self.sharpness)}
        return {f"{_PREFIX}.{name}": part for name, part in parts.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ClosedHead | None:
        """Read what ``to_tensors`` returned; ``None`` where a task has none."""
        if f"{_PREFIX}.weight" not in tensors:
            return None
        weight, bias, sharpness = (tensors[f"{_PREFIX}.{name}"] for name in ("weight", "bias", "sharpness"))
        return cls(LinearHead(weight, bias), float(sharpness))
