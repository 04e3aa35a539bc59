"""Say ``unknown`` of an input that is like nothing learned.

Either below a probability of the answer, or where the input is less familiar than a share of the project's own held-out
examples, which were never learned from, when they were last scored: so that at most 5 of 100 further ones would be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from treelora_cli.backend.values import Prediction
from treelora_cli.errors import UsageError

UNKNOWN = "unknown"
_AUTO = "auto"
_SHARE = 5.0
"""Percentage of own examples that ``auto`` calls unknown."""


@dataclass(frozen=True)
class Wanted:
    """A threshold as asked for: a probability, or the percentage of own examples that may be called unknown."""

    probability: float | None = None
    own: float | None = None


@dataclass(frozen=True)
class Threshold:
    """Below what an input is unknown; so is always what the backend itself says is of no task.

    Attributes:
        probability: Of the answer.
        familiarity: Of the input.
    """

    probability: float | None = None
    familiarity: float | None = None

    def __call__(self, answer: Prediction) -> Prediction:
        """Return the answer, or ``unknown`` with the answer first among what it could have been."""
        foreign = answer.task is None and answer.task_confidence is not None
        if not (foreign or _below(answer.confidence, self.probability) or _below(answer.familiarity, self.familiarity)):
            return answer
        likeliest = () if answer.confidence is None else ((answer.output, answer.confidence),)
        others = (*likeliest, *answer.others)
        return replace(answer, output=UNKNOWN, task=None, confidence=None, others=others, known=False)


def wanted(given: float | str) -> Wanted:
    """Read what ``--threshold`` was given: a probability, ``auto``, or ``auto:PERCENT``.

    Raises:
        UsageError: It is none of them.
    """
    text = str(given).strip().lower()
    name, _, percent = text.partition(":")
    try:
        number = float(percent or _SHARE) if name == _AUTO else float(text)
    except ValueError:
        number = -1.0
    if name == _AUTO and 0 < number < 100:
        return Wanted(own=number)
    if name != _AUTO and 0 <= number <= 1:
        return Wanted(probability=number)
    raise UsageError(
        f"--threshold {given}: expected a probability from 0 to 1, auto, or auto:PERCENT, the share of own held-out"
        f" examples that may be called unknown ({_SHARE:g})."
    )


def own_share(familiar: Iterable[float], percent: float) -> float | None:
    """Return the familiarity that so many of 100 further own examples are expected to fall below, at most.

    A further example falls below the k-th of n with probability k / (n + 1): the rank of split conformal prediction.
    Of too few for the percentage it is the least; ``None`` where there are none.
    """
    found = sorted(familiar)
    return found[max(0, math.floor((len(found) + 1) * percent / 100 + 1e-9) - 1)] if found else None


def _below(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value < limit
